"""The first steps: one workflow of two activities. Run it with ``python examples/first_steps.py``."""

import asyncio
from dataclasses import dataclass

from romancy import App, WorkflowContext, activity, workflow


@dataclass
class UserInput:
    user_id: str
    email: str
    name: str


@dataclass
class UserResult:
    user_id: str
    account_id: str
    status: str


@activity
async def create_database_record(user_id: str, email: str, name: str) -> dict[str, str]:
    return {"account_id": f"ACC-{user_id}", "email": email, "name": name}


@activity
async def send_welcome_email(email: str, name: str) -> dict[str, object]:
    return {"sent": True, "email": email}


@workflow
async def user_registration(ctx: WorkflowContext, user: UserInput) -> UserResult:
    account = await create_database_record(user.user_id, user.email, user.name)
    await send_welcome_email(account["email"], account["name"])
    return UserResult(user.user_id, account["account_id"], "completed")


async def main() -> None:
    async with App("users.db", worker_id="worker-1") as app:
        user = UserInput("user_123", "user@example.com", "John Doe")
        handle = await app.start_workflow(user_registration, user)
        print(handle.instance_id, await handle.result())


if __name__ == "__main__":
    asyncio.run(main())
