"""One rank: it loads the model, joins the ring and runs the steps that it is told.

A plain class; `ring_group` wraps it in a Ray actor. Rank 0 leads: it gets each plan from the
engine, hands it to the others and collects what they sampled.
"""

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch
from transformers.utils.logging import disable_progress_bar

from kvcluster.attention.ring import LoneRing
from kvcluster.cache.capacity import blocks_per_group
from kvcluster.cache.store import KVStore
from kvcluster.cluster.control import LEADER, ControlChannel
from kvcluster.cluster.runner import StepRunner
from kvcluster.cluster.running_step import StepBefore
from kvcluster.cluster.socket_ring import SocketRing
from kvcluster.cluster.spilling import SpillShare
from kvcluster.cluster.thread_share import ThreadShare
from kvcluster.cluster.torch_ring import TorchRing
from kvcluster.cluster.turns import Turns
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.config import ClusterConfig, TransportKind
from kvcluster.engine.plan import RankAnswer, StepPlan, result_of
from kvcluster.engine.spill_plan import SpillRead, SpillWrite
from kvcluster.errors import RankLost
from kvcluster.model.codecs import load_codecs
from kvcluster.model.loader import LoadedModel, load_model
from kvcluster.types import ModelSpec

WorkerRing = LoneRing | SocketRing | TorchRing


class Host(msgspec.Struct, frozen=True):
    """Where a rank runs."""

    machine: str
    """Differs between machines and is the same for all simulated nodes of one machine."""
    address: str
    num_cores: int
    has_gpu: bool


class Rendezvous(msgspec.Struct, frozen=True):
    """Where the ranks of one epoch meet: a directory for sockets, else host and port."""

    epoch: int
    transport: TransportKind
    directory: str = ""
    host: str = ""
    port: int = 0


class StepOrder(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 hands on: the plan, and what all ranks found in the step before."""

    plan: StepPlan
    before: StepBefore


class Worker:
    """One rank of a ring group. `follow` (all but rank 0) runs in one thread, `execute` (rank 0) in
    as many as there are steps under way."""

    def __init__(self, rank: int, config: ClusterConfig) -> None:
        self._rank = rank
        self._config = config
        self._share = ThreadShare(num_cores=1, ranks=frozenset({rank}))
        self._model: LoadedModel | None = None
        self._codecs: ModelCodecs | None = None
        self._ring: WorkerRing | None = None
        self._control: ControlChannel | None = None
        self._runner: StepRunner | None = None
        self._before = StepBefore()
        self._never = threading.Event()
        self._spilling: SpillShare | None = None
        self._is_warm = False
        self._memory = threading.Lock()
        """Held by a step, and by what reads or writes blocks beside the steps."""
        self._turns = Turns()
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="steps")

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def share_cores(self, machine_ranks: Sequence[int]) -> None:
        """Say which ranks run on this machine, this one included."""
        self._share = ThreadShare(
            num_cores=self.host().num_cores,
            ranks=frozenset(machine_ranks),
            fixed=self._config.ring.threads_per_rank,
        )

    def load(self) -> ModelSpec:
        """Load and probe the model.

        Raises: ModelNotFound, ModelUnsupported, CalibrationMismatch.
        """
        disable_progress_bar()  # type: ignore[no-untyped-call]
        torch.set_num_threads(self._share.threads(self._rank, tuple(self._share.ranks)))
        self._model = load_model(
            self._config.model,
            dtype=self._config.dtype,
            device=self.device,
            has_random_weights=self._config.weights == "random",
        )
        self._codecs = load_codecs(self._model, self._config.calibration)
        return self._model.spec

    def connect(self, meeting: Rendezvous) -> None:
        """Join the ring of an epoch with an empty cache; blocks until all ranks are there."""
        assert self._model is not None, "load comes before connect"
        assert self._codecs is not None
        self.disconnect()
        self._ring = ring = self._join(meeting)
        self._control = ControlChannel(ring)
        self._before = StepBefore()
        self._turns = Turns()
        spec = self._model.spec
        store = KVStore(
            spec,
            blocks_per_group=blocks_per_group(spec, self._config.cache, self._config.engine),
            block_size=self._config.cache.block_size,
            like=next(self._model.module.parameters()),
            codecs=self._codecs,
        )
        if self._config.cache.commit_at_start:
            store.commit()
        self._runner = StepRunner(
            model=self._model,
            store=store,
            ring=ring,
            epoch=meeting.epoch,
            exact_blocks=self._config.cache.exact_recent_blocks,
            share=self._share,
        )
        self._spilling = SpillShare(
            store,
            rank=self._rank,
            num_ranks=self._config.ring.num_ranks,
            exact_blocks=self._config.cache.exact_recent_blocks,
            lock=self._memory,
        )

    def execute(self, encoded_plan: bytes, place: int) -> bytes:
        """Rank 0: run a step with all ranks. Takes a StepPlan, gives a StepResult, as msgpack.

        Calls may overlap, each in a thread: steps begin in the order of `place`, from 1 on since
        `connect`, and while one call waits for what its step gives, the next step can begin.
        Raises: RankLost.
        """
        runner, control = self._running()
        plan = msgspec.msgpack.decode(encoded_plan, type=StepPlan)
        try:
            with self._turns.turn(place):
                # All steps begin in one thread: each thread that computes on a CPU has its own
                # threads beside it.
                begun = self._steps.submit(self._begin, runner, control, plan).result()
            result = result_of(plan, begun())
        except BaseException:
            # The others may be waiting for this rank in the middle of a layer: let them go.
            self.disconnect()
            raise
        return msgspec.msgpack.encode(result)

    def _begin(
        self, runner: StepRunner, control: ControlChannel, plan: StepPlan
    ) -> Callable[[], list[RankAnswer]]:
        """Begin a step on all ranks. What is returned waits for their answers."""
        order = StepOrder(plan, self._before)
        control.broadcast(msgspec.msgpack.encode(order))
        with self._memory:
            running = runner.begin(plan, self._before)
        self._note_ended(plan)
        if self._config.ring.num_ranks == 1:
            return lambda: [running.outcome().answer]
        outcome = running.outcome()
        others = [rank for rank in outcome.answering_ranks if rank != LEADER]
        answers = [outcome.answer]
        answers += [
            msgspec.msgpack.decode(answer, type=RankAnswer) for answer in control.collect(others)
        ]
        self._before = StepBefore.of(result_of(plan, answers))
        return lambda: answers

    def follow(self) -> None:
        """Other ranks: run the steps that rank 0 hands on until the ring is closed.

        Raises: RankLost when the ring breaks, and whatever a step raised here.
        """
        runner, control = self._running()
        try:
            while True:
                order = msgspec.msgpack.decode(control.receive(), type=StepOrder)
                with self._memory:
                    outcome = runner.run(order.plan, order.before)
                # Rank 0 knows from the plan who has something to say, and waits for nobody else.
                if self._rank in outcome.answering_ranks:
                    control.reply(msgspec.msgpack.encode(outcome.answer))
                self._note_ended(order.plan)
        finally:
            self.disconnect()

    def note_warm(self) -> None:
        """All that steps load is loaded. For a rank that has its process to itself."""

    def _note_ended(self, plan: StepPlan) -> None:
        # The first sequence of all is the one that proves that the ring works.
        if plan.ended and not self._is_warm:
            self._is_warm = True
            self.note_warm()

    def write_spill(self, encoded_order: bytes) -> bytes:
        """Write this rank's share of a context. Takes a SpillWrite, gives the receipts, as msgpack.

        Raises: SpillDiskFull, SpillUnavailable, RankLost.
        """
        order = msgspec.msgpack.decode(encoded_order, type=SpillWrite)
        return msgspec.msgpack.encode(self._joined().write(order))

    def read_spill(self, encoded_order: bytes) -> None:
        """Read this rank's share of a context into its blocks. Takes a SpillRead as msgpack.

        Raises: SealedCacheDamaged, SavedCacheMismatch, SpillUnavailable, RankLost.
        """
        order = msgspec.msgpack.decode(encoded_order, type=SpillRead)
        self._joined().read(order)

    def _joined(self) -> SpillShare:
        if self._spilling is None:
            raise RankLost(f"rank {self._rank} has not joined a ring")
        return self._spilling

    def live(self) -> None:
        """Does not return while the process lives: whoever waits for it learns of its end."""
        self._never.wait()

    def disconnect(self) -> None:
        """Leave the ring; a thread that waits in it gets RankLost. Safe to call at any time."""
        self._turns.end()
        if self._ring is not None:
            self._ring.close()

    def address(self) -> str:
        """Where the other ranks reach this one. Outside Ray there is only this machine."""
        return "127.0.0.1"

    def host(self) -> Host:
        """Facts for choosing a transport."""
        return Host(
            machine=_machine(),
            address=self.address(),
            num_cores=len(os.sched_getaffinity(0)),
            has_gpu=torch.cuda.is_available(),
        )

    def propose_meeting(self, epoch: int, transport: TransportKind) -> Rendezvous:
        """Rank 0: make a place where the ranks of an epoch can meet."""
        if transport is TransportKind.SOCKETS:
            directory = tempfile.mkdtemp(prefix="kvcluster-ring-")
            return Rendezvous(epoch, transport, directory=directory)
        host = self.host().address
        with socket.socket() as probe:
            probe.bind((host, 0))
            return Rendezvous(epoch, transport, host=host, port=probe.getsockname()[1])

    def close_meeting(self, meeting: Rendezvous) -> None:
        """Rank 0: all have met; remove what `propose_meeting` made."""
        if meeting.directory:
            shutil.rmtree(meeting.directory)

    def _join(self, meeting: Rendezvous) -> WorkerRing:
        size = self._config.ring.num_ranks
        timeout_s = self._config.engine.step_timeout_s
        if size == 1:
            return LoneRing()
        if meeting.transport is TransportKind.SOCKETS:
            return SocketRing.connect(
                self._rank, size, Path(meeting.directory), timeout_s=timeout_s
            )
        return TorchRing.connect(
            self._rank,
            size,
            (meeting.host, meeting.port),
            timeout_s=timeout_s,
            with_gpu=meeting.transport is TransportKind.NCCL,
        )

    def _running(self) -> tuple[StepRunner, ControlChannel]:
        if self._runner is None or self._control is None:
            raise RankLost(f"rank {self._rank} has not joined a ring")
        return self._runner, self._control


def _machine() -> str:
    """The running kernel and the folder for sockets: two containers share one but not the other."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    folder = Path(tempfile.gettempdir()).stat()
    return f"{boot_id}-{folder.st_dev}-{folder.st_ino}"
