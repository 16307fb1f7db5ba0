"""What is asked of an app from outside of workflows."""
