"""The engine: runs workflow code deterministically and records what happens."""
