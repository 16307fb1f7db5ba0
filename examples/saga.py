"""A saga: what a workflow has done is undone, last in first out, when it fails or is cancelled.

It prints:

    booked the flight to Rome
    booked 2 nights at the Excelsior
    the card was refused
    cancelled room 2-at-the-Excelsior
    told the guide
    cancelled the flight to Rome
    the trip is failed
    booked the flight to Oslo
    cancelled the flight to Oslo
    the trip is cancelled: the customer fell ill
"""

import asyncio

from romancy import (
    App,
    TerminalError,
    WorkflowCancelledError,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    workflow,
)


@activity
async def cancel_flight(city: str) -> None:
    print(f"cancelled the flight to {city}")


@activity(compensate=cancel_flight)  # gets the same city
async def book_flight(city: str) -> str:
    print(f"booked the flight to {city}")
    return f"flight to {city}"


@activity
async def cancel_room(result: str) -> None:
    print(f"cancelled room {result}")


@activity(compensate=cancel_room)  # gets what this returns
async def book_room(nights: int, hotel: str) -> str:
    print(f"booked {nights} nights at {hotel}")
    return f"{nights}-at-{hotel.replace(' ', '-')}"


@activity
async def tell(whom: str) -> None:
    print(f"told {whom}")


@activity
async def charge(amount: int) -> None:
    print("the card was refused")
    raise TerminalError("no money")


@workflow
async def trip(ctx: WorkflowContext, city: str) -> None:
    await book_flight(city)
    if city == "Oslo":
        await ctx.wait_event("confirmed", key=ctx.instance_id)
    ctx.on_failure(tell, "the guide")
    await book_room(2, "the Excelsior")
    await charge(500)


async def main() -> None:
    async with App(":memory:") as app:
        rome = await app.start_workflow(trip, "Rome")
        try:
            await rome.result()
        except WorkflowFailedError:
            print("the trip is", await rome.status())

        oslo = await app.start_workflow(trip, "Oslo")
        while await oslo.status() != "waiting_for_event":
            await asyncio.sleep(0.01)
        await oslo.cancel("the customer fell ill")
        try:
            await oslo.result()
        except WorkflowCancelledError as error:
            print("the trip is cancelled:", str(error).rpartition(": ")[2])


if __name__ == "__main__":
    asyncio.run(main())
