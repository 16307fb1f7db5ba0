"""Events: a workflow waits for a payment, told by a webhook or by another workflow's activity.

It prints:

    order-1 was paid: 17.50, says shop
    order-2 was paid: 3.00, says romancy:pay_by_invoice/invoice-2
    order-3 was not paid in time
    the same webhook again counts: False
"""

import asyncio
from dataclasses import dataclass
from decimal import Decimal

from romancy import App, Event, EventTimeoutError, WorkflowContext, activity, current_activity, workflow


@dataclass
class Payment:
    amount: Decimal


@workflow
async def order(ctx: WorkflowContext, patience_s: float) -> str:
    try:
        # An event with this key is kept until it is waited for, so it may come first.
        event: Event[Payment] = await ctx.wait_event(
            "payment.completed", key=ctx.instance_id, timeout=patience_s, type=Payment
        )
    except EventTimeoutError:
        return f"{ctx.instance_id} was not paid in time"
    return f"{ctx.instance_id} was paid: {event.data.amount}, says {event.source}"


@activity
async def book_invoice(order_id: str) -> None:
    # Sent if and when this activity's outcome is recorded, in the same transaction.
    current_activity().send_event("payment.completed", Payment(Decimal("3.00")), key=order_id)


@workflow
async def pay_by_invoice(ctx: WorkflowContext, order_id: str) -> None:
    await book_invoice(order_id)


async def main() -> None:
    async with App(":memory:") as app:
        paid = await app.start_workflow(order, 60, id="order-1")
        invoiced = await app.start_workflow(order, 60, id="order-2")
        unpaid = await app.start_workflow(order, 0.01, id="order-3")

        payment = Payment(Decimal("17.50"))
        await app.send_event("payment.completed", payment, key="order-1", source="shop", id="hook-1")
        await app.start_workflow(pay_by_invoice, "order-2", id="invoice-2")

        for handle in (paid, invoiced, unpaid):
            print(await handle.result())
        again = await app.send_event("payment.completed", payment, key="order-1", source="shop", id="hook-1")
        print("the same webhook again counts:", again)


if __name__ == "__main__":
    asyncio.run(main())
