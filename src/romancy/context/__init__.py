"""What user code holds while it runs: ``WorkflowContext`` in workflows, ``ActivityContext`` in activities."""

from romancy.context.activity import CURRENT_ACTIVITY, ActivityContext, current_activity
from romancy.context.workflow import ChildHandle, WorkflowContext

__all__ = ["CURRENT_ACTIVITY", "ActivityContext", "ChildHandle", "WorkflowContext", "current_activity"]
