"""The mutants: faults of the kind that such engines have had, each as a change of a few words."""

from __future__ import annotations

from torture.mutants.gate import Mutant

WORKERS = "tests/engine/test_workers.py"
AGAIN = "tests/engine/test_again.py"
ODD = "tests/engine/test_odd_moments.py"
CHILDREN = "tests/engine/test_children.py"
CHANNELS = "tests/engine/test_channels.py"
EVENTS = "tests/engine/test_events.py"
RETRIES = "tests/engine/test_retries.py"
SESSIONS = "tests/engine/test_sessions.py"
SAGAS = "tests/engine/test_sagas.py"
WRITER = "tests/storage/test_writer.py"
DESK = "tests/storage/test_mail_desk.py"
LOST = "tests/storage/test_lost_connections.py"
CLAIMS = "tests/storage/test_claims.py"
FLUSH = "tests/storage/test_postgresql_flush.py"
FLIGHT = "tests/storage/test_flight.py"

MUTANTS = (
    Mutant(
        "no fence in the writer",
        "storage/group_commit.py",
        """        if worker_id is not None:
            self._check_fence(link, worker_id, self._statements.fence)
        for""",
        """        for""",
        (f"{WORKERS}::test_zombie_writes_nothing_more_and_the_app_begins_a_new_life",),
    ),
    Mutant(
        "no fence in the transactions of activities",
        "storage/sqlite.py",
        """        if connection.execute(alive.values(lease_until=renew_until)).rowcount != 1:
            raise fenced(worker_id)
        connection""",
        """        connection.execute(alive.values(lease_until=renew_until))
        connection""",
        (f"{SESSIONS}::test_lost_lease_rolls_back_the_users_rows",),
    ),
    Mutant(
        "conflicts in history are ignored",
        "storage/group_commit.py",
        """ManyRows(insert_into(history, HistoryRow._fields),""",
        """ManyRows(insert_into(history, HistoryRow._fields).replace("INSERT", "INSERT OR IGNORE"),""",
        (f"{CLAIMS}::test_event_that_is_there_already_is_refused_and_the_first_one_stays[sqlite]",),
    ),
    Mutant(
        "a wait does not look for what has come before it",
        "storage/mail_desk.py",
        """        open_waits = registrations
        taken""",
        """        self._insert_waits(registrations)
        open_waits: list[Wait] = []
        taken""",
        (f"{EVENTS}::test_event_with_a_key_is_kept_until_somebody_waits[sqlite]",),
    ),
    Mutant(
        "the listener listens without looking first",
        "storage/listener.py",
        """                # First listen, then look: what came in between is found by that look.
                self._on_hint()
""",
        "",
        ("tests/storage/test_listener.py",),
    ),
    Mutant(
        "news are found by a cursor, so that a late commit is passed over",
        "storage/mail_desk.py",
        """    found = [Delivery(*row) for row in rows]
    if not workflow_names:""",
        """    found = [Delivery(*row) for row in rows if row[4] > getattr(find_news, "cursor", "")]
    find_news.cursor = max([d.mail_id for d in found], default=getattr(find_news, "cursor", ""))
    if not workflow_names:""",
        (f"{DESK}::test_mail_with_an_older_id_that_is_committed_later_is_news_too[sqlite]",),
    ),
    Mutant(
        "the lease of a worker that was buried is renewed",
        "storage/statements.py",
        "self.renew = prepare(update(workers).where(alive,",
        "self.renew = prepare(update(workers).where(workers.c.worker_id == me,",
        (f"{CLAIMS}::test_lease_that_was_lost_is_not_renewed[sqlite]",),
    ),
    Mutant(
        "a worker is buried before its lease has ended",
        "storage/statements.py",
        """                or_(workers.c.lease_until < now, literal(1) == bindparam("is_gone")),""",
        """                or_(workers.c.lease_until < now + 10**15, literal(1) == bindparam("is_gone")),""",
        (f"{CLAIMS}::test_worker_that_has_renewed_meanwhile_is_not_buried[sqlite]",),
    ),
    Mutant(
        "no lock on the slots of the mail",
        "storage/mail_desk.py",
        """ ORDER BY slot FOR UPDATE\"""",
        """ ORDER BY slot\"""",
        (f"{DESK}::test_no_meeting_is_missed_by_two_processes_at_once",),
    ),
    Mutant(
        "what has met is told, but not stored",
        "storage/mail_desk.py",
        """        self.insert(deliveries.name, Delivery._fields, met)
        self.post.deliveries += met""",
        """        self.post.deliveries += met""",
        (DESK,),
    ),
    Mutant(
        "what meets a wait that was there is told, but not stored",
        "storage/mail_desk.py",
        """                *self._insertion(deliveries.name, Delivery._fields, met, ignore=False),
""",
        "",
        (f"{EVENTS}::test_waiting_instance_goes_on_after_a_restart[sqlite]",),
    ),
    Mutant(
        "a delivery is removed when it is read, before it is recorded",
        "storage/mail_desk.py",
        """        found += [Delivery(*row) for row in rows]
    return found, still_open""",
        """        found += [Delivery(*row) for row in rows]
        execute(f"DELETE FROM {deliveries.name} WHERE {condition}", values)
    return found, still_open""",
        (f"{EVENTS}::test_delivery_survives_a_crash_between_its_claim_and_its_record[sqlite]",),
    ),
    Mutant(
        "a wait that becomes a delivery while both are read is overlooked",
        "storage/mail_desk.py",
        """        fields = ", ".join(Wait._fields)
        rows = execute(f"SELECT {fields} FROM {waits.name} WHERE {condition}", values).fetchall()
        still_open += [Wait(*row) for row in rows]
        fields = ", ".join(Delivery._fields)
        rows = execute(f"SELECT {fields} FROM {deliveries.name} WHERE {condition}", values).fetchall()
        found += [Delivery(*row) for row in rows]
""",
        """        fields = ", ".join(Delivery._fields)
        rows = execute(f"SELECT {fields} FROM {deliveries.name} WHERE {condition}", values).fetchall()
        found += [Delivery(*row) for row in rows]
        fields = ", ".join(Wait._fields)
        rows = execute(f"SELECT {fields} FROM {waits.name} WHERE {condition}", values).fetchall()
        still_open += [Wait(*row) for row in rows]
""",
        (f"{DESK}::test_mail_that_meets_its_wait_while_both_are_read_is_not_overlooked[sqlite]",),
    ),
    Mutant(
        "a message from outside has no id that is kept",
        "storage/posting.py",
        "digest = sha256(f\"message\\0{mail_id}\".encode()).hexdigest() if is_from_outside else None",
        "digest = None",
        (f"{LOST}::test_message_whose_commit_was_not_heard_of_is_delivered_once",),
    ),
    Mutant(
        "a message and its timeout are both recorded",
        "storage/mail_desk.py",
        """        self.post.kept += [delivery for delivery in delivered if delivery[:3] not in returning]
""",
        "",
        (f"{DESK}::test_desk_does_what_the_model_says[sqlite]",),
    ),
    Mutant(
        "a retry is not recorded",
        "engine/instance.py",
        """        self._record(self._event(RETRY, operation, result=began, error=encode_error(error), due_at=operation.due_us))
""",
        """        del began
""",
        (f"{RETRIES}::test_crash_during_backoff_neither_restarts_the_count_nor_forgets_the_wait[sqlite]",),
    ),
    Mutant(
        "replay forgets the rest of a backoff",
        "engine/replayed.py",
        "operation.due_us = event.due_at or 0",
        "operation.due_us = 0",
        (f"{RETRIES}::test_crash_during_backoff_neither_restarts_the_count_nor_forgets_the_wait[sqlite]",),
    ),
    Mutant(
        "a start is acknowledged before its commit",
        "storage/writer.py",
        "        return await start.future",
        "        return True",
        (f"{WRITER}::test_start_returns_when_it_is_durable_and_not_before",),
    ),
    Mutant(
        "a result is given out before its commit",
        "engine/instance.py",
        "        host.writer.when_durable(ticket, partial(self._on_end_written, state))",
        "        host.on_ended(self, state)",
        (f"{WRITER}::test_result_is_not_given_out_before_the_end_is_durable",),
    ),
    Mutant(
        "activities do not wait for the commit of the outcome before",
        "engine/instance.py",
        "        elif self.ticket <= self._host.writer.committed:\n            self._run_activity(operation)",
        "        elif self.ticket <= self._host.writer.committed + 2:\n            self._run_activity(operation)",
        (f"{WRITER}::test_no_activity_starts_before_the_outcome_before_it_is_durable",),
    ),
    Mutant(
        "compensations run in the order of what they undo",
        "engine/saga.py",
        "self._undos.pop()",
        "self._undos.pop(0)",
        (f"{SAGAS}::test_failed_workflow_undoes_what_it_did_last_in_first_out[sqlite]",),
    ),
    Mutant(
        "replay forgets what is to be undone",
        "engine/replayed.py",
        """            if operation.activity.compensate is not None:
                self._add_undo(undo_of(operation, value))
            self._resolve(operation.future, value, None)
        else""",
        """            self._resolve(operation.future, value, None)
        else""",
        (f"{SAGAS}::test_crash_at_any_commit_undoes_each_thing_once_recorded",),
    ),
    Mutant(
        "replay forgets timers",
        "engine/instance.py",
        "        still_open = {id(operation) for operation in self._open()}",
        "        still_open = {id(op) for op in self._open() if not isinstance(op, TimerOperation)}",
        (f"{ODD}::test_sleepers_are_never_taken_for_poison[sqlite]", f"{WORKERS}::test_cold_sleepers_leave_memory_and_wake_by_the_database[sqlite]"),
    ),
    Mutant(
        "replay forgets the end of a run",
        "engine/instance.py",
        " if id(op) in still_open or isinstance(op, RecurOperation)]",
        " if id(op) in still_open]",
        (f"{CHILDREN}::test_crash_at_any_commit_loses_no_run[sqlite-before]",),
    ),
    Mutant(
        "what is claimed is forgotten when the next question fails",
        "engine/claims.py",
        """            self._claimed += rows
            if len(rows) < limit:
                self._next_due_us = await _done(self._store.next_due())
""",
        """            if len(rows) < limit:
                self._next_due_us = await _done(self._store.next_due())
            self._claimed += rows
""",
        (f"{ODD}::test_what_was_claimed_is_run_also_when_the_database_fails_right_after[sqlite]",),
    ),
    Mutant(
        "what others have locked is asked for without a pause",
        "engine/claims.py",
        "self._next_due_us = now_us + LOCKED_WAIT_US",
        "self._next_due_us = now_us",
        (f"{ODD}::test_worker_does_not_ask_without_end_for_what_another_has_locked[postgresql]",),
    ),
    Mutant(
        "claims take what is owned",
        "storage/statements.py",
        "        free = and_(instances.c.owner.is_(None), instances.c.completed_at.is_(None))",
        "        free = and_(instances.c.completed_at.is_(None))",
        (f"{CLAIMS}::test_what_is_owned_is_not_claimed[sqlite]",),
    ),
    Mutant(
        "claims do not lock what they find",
        "storage/statements.py",
        """            .order_by(instances.c.ready_at)
            .limit(limit)
            .with_for_update(skip_locked=True)""",
        """            .order_by(instances.c.ready_at)
            .limit(limit)""",
        (f"{CLAIMS}::test_two_workers_that_claim_at_once_share_what_there_is",),
    ),
    Mutant(
        "a state is written on what is another's",
        "storage/sqlite.py",
        "AND {instances.name}.owner = v.column9\"",
        "AND v.column9 = v.column9\"",
        (f"{CLAIMS}::test_state_of_what_is_anothers_is_refused[sqlite]",),
    ),
    Mutant(
        "a batch whose answer was lost is just sent again",
        "storage/group_commit.py",
        "batch.is_unsure = batch.is_unsure or is_lost(error)",
        "batch.is_unsure = False",
        (f"{LOST}::test_connection_that_breaks_at_any_request",),
    ),
    Mutant(
        "deaths of workers are not counted",
        "storage/store.py",
        "claimed = self._take(link, found, me, now, counted=1)",
        "claimed = self._take(link, found, me, now, counted=0)",
        (f"{WORKERS}::test_instance_that_kills_its_workers_is_parked[sqlite]",),
    ),
    Mutant(
        "a patch that is met last is refused with the end of its run",
        "storage/group_commit.py",
        """owner = worker_id if party.state is None else party.state.owner""",
        """owner = worker_id""",
        (f"{CHILDREN}::test_patch_that_is_met_last_goes_with_the_end_of_the_run[sqlite]",),
    ),
    Mutant(
        "the state of a run is written before the run begins",
        "storage/group_commit.py",
        """        if party.state is not None and party.state.instance_id in begun:""",
        """        if False:""",
        (f"{CHILDREN}::test_run_that_follows_another_at_once_shows_what_it_waits_for[sqlite]",),
    ),
    Mutant(
        "patches are forgotten by the next worker",
        "engine/run.py",
        """{} if patches is None else dict.fromkeys(load_json(patches), True)""",
        """{}""",
        (f"{CHILDREN}::test_patched_code_runs_where_the_run_has_not_gone_past[sqlite]",),
    ),
    Mutant(
        "a suspended instance goes on",
        "engine/instance.py",
        """            self._leave_as(Status.SUSPENDED, None)
        elif""",
        """            self._record_status(Status.SUSPENDED.value)
        elif""",
        (f"{SAGAS}::test_suspended_instance_rests_until_it_is_resumed[sqlite]",),
    ),
    Mutant(
        "an end that was asked for does not wake what was set aside",
        "storage/mail_desk.py",
        """(d.kind = ? AND d.name = ? AND i.error IS NULL)""",
        """(d.kind = ? AND d.name = ? AND i.error IS NULL AND 0 = 1)""",
        (f"{SAGAS}::test_end_that_is_asked_for_while_a_rest_is_on_its_way_comes[sqlite-True]",),
    ),
    Mutant(
        "mail wakes what was set aside after the look for it",
        "storage/statements.py",
        """instances.c.instance_id.in_(ids), known, may_wake)""",
        """instances.c.instance_id.in_(ids), known)""",
        (f"{CLAIMS}::test_what_was_set_aside_after_the_look_is_not_claimed_for_its_mail[sqlite]",),
    ),
    Mutant(
        "a second request to rest outlives the resume",
        "storage/store.py",
        """                if is_resumed:
                    MailDesk(""",
        """                if False:
                    MailDesk(""",
        (f"{SAGAS}::test_instance_that_was_suspended_twice_goes_on_after_one_resume[sqlite]",),
    ),
    Mutant(
        "a retry takes back what was done before anything failed",
        "storage/again.py",
        """        gone = [*failures, """,
        """        gone = [*events[:1], *failures, """,
        (f"{AGAIN}::test_retry_goes_on_from_the_failed_activity[sqlite]",),
    ),
    Mutant(
        "a fork does the step before its activity again",
        "storage/again.py",
        """        prefix = events[:cut]""",
        """        prefix = events[: max(cut - 1, 0)]""",
        (f"{AGAIN}::test_fork_goes_its_own_way_from_there[sqlite]",),
    ),
    Mutant(
        "a fork of a fork is not known again",
        "storage/again.py",
        """ORDER BY h.seq DESC",""",
        """ORDER BY h.seq",""",
        (f"{AGAIN}::test_fork_goes_its_own_way_from_there[sqlite]",),
    ),
    Mutant(
        "an outcome that was not found may still arrive",
        "storage/store.py",
        """                    for sql, values, _ in self._history.pieces([plug]):
                        link.execute(sql, values)
""",
        """                    pass
""",
        ("tests/engine/test_late_commits.py",),
    ),
    Mutant(
        "a failure that a session's code has swallowed is forgotten",
        "storage/sessions.py",
        """        session.of_activity.check()
""",
        """        pass
""",
        (f"{SESSIONS}::test_statement_that_ends_the_transaction_fails_the_attempt[postgresql]",),
    ),
    Mutant(
        "what a session has committed goes with a later rollback",
        "storage/sessions.py",
        """    session.join_transaction_mode = WITH_SAVEPOINT
""",
        """    pass
""",
        (f"{SESSIONS}::test_users_commit_and_rollback_touch_a_savepoint_only[postgresql]",),
    ),
    Mutant(
        "mail that is sent twice at the same moment counts twice",
        "storage/mail_desk.py",
        """            known |= {digest: mail_id for digest, mail_id in found.items() if mail_id != firsts[digest].mail_id}
""",
        """            del found
""",
        (EVENTS,),
    ),
    Mutant(
        "PostgreSQL's group commit writes without the fence",
        "storage/postgresql_flush.py",
        """SELECT {event} FROM {source} WHERE {_ALIVE})")""",
        """SELECT {event} FROM {source})")""",
        (f"{FLUSH}::test_without_the_lease_nothing_is_written",),
    ),
    Mutant(
        "PostgreSQL's group commit writes the states of others' instances",
        "storage/postgresql_flush.py",
        """{_FEW_FOR_THE_PLANNER} AND {_OWNER} = %s \"""",
        """{_FEW_FOR_THE_PLANNER} AND %s IS NOT NULL \"""",
        (f"{FLUSH}::test_an_instance_of_somebody_else_fails_all_of_it",),
    ),
    Mutant(
        "a name that reads like a missing value counts as one",
        "storage/postgresql_flush.py",
        """    if [row for row in table if none in row]:
""",
        """    if none is None:
""",
        (f"{FLUSH}::test_the_word_none_is_a_text_like_others",),
    ),
    Mutant(
        "what the loop has sent counts as refused when its connection breaks",
        "storage/postgresql.py",
        """        batch.is_unsure = is_lost(error)
""",
        "",
        (f"{FLIGHT}::test_connection_that_breaks_on_the_way_leaves_it_unsure",),
    ),
    Mutant(
        "the thread uses a connection that it has lent",
        "storage/threads.py",
        """            loan.finish()
""",
        """            self.give_back()
""",
        (f"{FLIGHT}::test_thread_finishes_what_a_blocked_loop_has_begun",),
    ),
    Mutant(
        "the loop uses a connection that the thread uses",
        "storage/threads.py",
        """if self._unfinished or self._loan""",
        """if self._loan""",
        (f"{FLIGHT}::test_thread_that_is_busy_writes_itself",),
    ),
)  # fmt: skip
"""In the order of the seed of all trouble: leases, mail, replay, claims, and what is asked of instances from outside."""
