"""One flush of FedBuff's buffer: starting clients are trained at once, and their updates wait until their simulated arrival."""

from flwr.app import Message
from torch import Tensor

from fedsim.core.communication import CommunicationLedger
from fedsim.core.fedbuff import Flush, Job, Queue, Update, staleness_weight
from fedsim.core.global_state import GlobalState
from fedsim.core.missing import Missing
from fedsim.errors import RunStopped
from fedsim.flower.aggregation import Aggregation
from fedsim.flower.asking import Ask, Asking
from fedsim.flower.charging import Charges
from fedsim.flower.reading import Reader, Upload
from fedsim.flower.rounds import Round
from fedsim.session import Session


class BufferedRound(Round):
    """The step from one version to the next. An upload is charged when it arrives."""

    def __init__(
        self,
        session: Session,
        state: GlobalState,
        asking: Asking,
        ledger: CommunicationLedger,
        server_round: int,
        flush: Flush,
        queue: Queue,
    ) -> None:
        super().__init__(asking, server_round, wanted=len(flush.begun))
        self._session, self._state, self._ledger, self._flush, self._queue = session, state, ledger, flush, queue

    def _use(self, ask: Ask, reply: Message) -> None:
        sent = CommunicationLedger()
        reader = Reader(self._session, self._state, Charges(self._session, self._state, sent), self._round)
        start, updates = self._start(), self._state.buffer.updates
        numbers = {job.client: job.number for job in self._flush.begun}
        for upload in reader.uploads(ask, reply):
            if isinstance(upload, Missing):
                self.facts.missing.append(upload)
            else:
                facts = (upload.num_examples, upload.num_tokens, upload.loss)
                updates[numbers[upload.client]] = Update(*facts, upload.flat - _at(start, upload.positions))
        for row in sent.rows():
            update = updates.get(numbers[int(row["client"])])
            if update is not None:
                update.sent.append(row)
            else:  # refused: it will not arrive later
                self._ledger.add_rows([row])

    def finish(self) -> None:
        """Makes the next version from the updates that have arrived."""
        self._state.buffer.queue, start = self._queue, self._start()
        aggregation = Aggregation(self._session, self._state, self._round, self.facts)
        for job in self._flush.arrived:
            update = self._state.buffer.updates.pop(job.number, None)
            if update is not None:  # a refused update was never stored
                aggregation.add(self._upload(job, update, start))
                self._ledger.add_rows([row | {"round": self._round} for row in update.sent])
                self.facts.staleness.append(self._age(job))
        if self._flush.arrived and not self.facts.clients:
            details = sorted({each.detail for each in self.facts.missing})
            raise RunStopped(
                f"Expected updates in the buffer of round {self._round}, but all that arrived were refused{': ' if details else ''}"
                f"{'; '.join(details)[:300]}. Where training has diverged, lower training.learning_rate and start again."
            )
        aggregation.finish()

    def _upload(self, job: Job, update: Update, start: Tensor) -> Upload:
        positions = self._session.sent_positions(job.version + 1, job.client)
        flat = _at(start, positions) + staleness_weight(self._age(job)) * update.change
        return Upload(job.client, update.num_examples, update.num_tokens, update.loss, True, flat, positions)

    def _age(self, job: Job) -> int:
        return self._round - 1 - job.version

    def _start(self) -> Tensor:
        return self._state.flat(self._session.method.uploaded(self._round))


def _at(flat: Tensor, positions: Tensor | None) -> Tensor:
    return flat if positions is None else flat[positions]
