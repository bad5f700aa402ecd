"""Messages between stages of different ranks: their shapes are agreed once, receives are posted ahead.

A program says where a transfer has its place at the latest. On a CPU each link (the messages of one peer) has up to
``AHEAD`` receives posted that the program has not come to yet, or ``AHEAD_BYTES`` of them if that is more, posted while
this rank waits anyway, and a message leaves as soon as it is made and all before it on its link have left: the wire
works while this rank computes. On a device, whose queue of messages is strictly in order, they start where the program
says, neighbours together. Sent tensors are kept until they are gone; at most ``KEPT`` of them a link, waited for where
the program sends, because its order is one in which every send may wait for its receive (those of
``camshaft_pipeline.transfers``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from camshaft.comm import Channel, Message, Pending
from camshaft.program import TRANSFERS, Action, Kind
from camshaft_pipeline.schedule import Schedule

AHEAD, KEPT = 2, 4
AHEAD_BYTES = 1 << 20
HOOK = "handlers"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WORDS = 12


class Form(NamedTuple):
    """What a message looks like, and whether a gradient of it is wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """The form of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    @property
    def nbytes(self) -> int:
        """Size of the message."""
        return prod(self.shape) * self.dtype.itemsize

    def pack(self, device: torch.device) -> Tensor:
        """As int64 [12]: dtype, trains, number of dimensions, sizes."""
        words = [DTYPES.index(self.dtype), int(self.trains), len(self.shape), *self.shape]
        return torch.tensor(words + [0] * (_WORDS - len(words)), dtype=torch.int64, device=device)

    @classmethod
    def unpack(cls, words: Sequence[int]) -> Form:
        """What ``pack`` wrote."""
        dtype, trains, dimensions, *sizes = words
        return cls(tuple(sizes[:dimensions]), DTYPES[dtype], bool(trains))

    def empty(self, device: torch.device) -> Tensor:
        """Room for the message."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class Line:
    """The channel to the other ranks of the pipeline, and what is under way on it."""

    def __init__(self, channel: Channel, device: torch.device, kept: int | None) -> None:
        self.channel, self.device = channel, device
        self._kept = kept
        self._sent: dict[int, deque[tuple[Pending, Tensor]]] = {}

    def send(self, tensor: Tensor, peer: int) -> None:
        """Start to send ``tensor``, which must not change any more, and wait for the oldest if it is one too many."""
        self.note(self.channel.send(tensor, peer, HOOK), tensor, peer)
        self.drain(peer)

    def note(self, pending: Pending, tensor: Tensor, peer: int) -> None:
        """Keep ``tensor`` until it is gone."""
        sent = self._sent.get(peer)
        if sent is None:
            sent = self._sent[peer] = deque()
        sent.append((pending, tensor))

    def full(self, peer: int) -> bool:
        """Whether more is under way to ``peer`` than may be."""
        return self._kept is not None and len(self._sent.get(peer, ())) > self._kept

    def drain(self, peer: int) -> None:
        """Wait until no more is under way to ``peer`` than may be."""
        while self.full(peer):
            self._sent[peer].popleft()[0].wait()

    def settle(self) -> None:
        """Wait until everything is gone."""
        for sent in self._sent.values():
            while sent:
                sent.popleft()[0].wait()

    def tell(self, form: Form, peer: int) -> None:
        """Say what the next message to ``peer`` looks like."""
        self.send(form.pack(self.device), peer)

    def ask(self, peer: int) -> Form:
        """Wait for what ``peer`` says of its next message."""
        words = torch.empty(_WORDS, dtype=torch.int64, device=self.device)
        self.channel.recv(words, peer, HOOK).wait()
        return Form.unpack(words.tolist())


class Transport:
    """Moves activations and gradients of one rank's program."""

    def __init__(self, schedule: Schedule, place: int, line: Line) -> None:
        self._schedule, self._place, self.line = schedule, place, line
        program = schedule.programs[place]
        self._receives: dict[int, list[Action]] = {}
        self._sends: dict[int, list[Action]] = {}
        for action in program:
            if action.kind in TRANSFERS:
                table = self._sends if action.kind in (Kind.SEND_F, Kind.SEND_B) else self._receives
                table.setdefault(schedule.peer(place, action), []).append(action)
        self._ahead = line.device.type == "cpu"
        self._runs = _runs(program, together=not self._ahead)
        self._posted: dict[int, int] = {}
        self._reached: dict[int, int] = {}
        self._left: dict[int, int] = {}
        """Of each link's sends, how many have left."""
        self._stale: set[int] = set()
        """Links with room for further receives."""
        self._coming: dict[Action, tuple[Pending, Tensor]] = {}
        self._outbox: dict[Action, Tensor | None] = {}
        self._told: set[int] = set()
        self._passes: dict[tuple[int, torch.Size], Form] = {}
        """In evaluation, whose last batch may be smaller."""
        self.forms: dict[int, Form] = {}
        """Of what each stage makes, once it is known: this rank's stages, and those before them."""

    def start_window(self) -> None:
        """Nothing of this window has been received or sent."""
        self._posted = dict.fromkeys(self._receives, 0)
        self._reached = dict.fromkeys(self._receives, 0)
        self._left = dict.fromkeys(self._sends, 0)
        if self._ahead:
            self._stale.update(self._receives)

    def put(self, action: Action, tensor: Tensor | None) -> None:
        """``tensor`` is what ``action``, a send, will send; None where nobody wants it."""
        self._outbox[action] = tensor
        if self._ahead:
            peer = self._schedule.peer(self._place, action)
            sends = self._sends[peer]
            while self._left[peer] < len(sends) and sends[self._left[peer]] in self._outbox:
                self._leave(sends[self._left[peer]], peer)

    def take(self, action: Action) -> Tensor | None:
        """Wait for what ``action``, a receive, brings; None where nothing was sent."""
        coming = self._coming.pop(action, None)
        if coming is None:
            return None
        if self._stale:
            self._post_ahead()
        pending, tensor = coming
        pending.wait()
        return tensor

    def run(self, action: Action) -> None:
        """Do a transfer of the program, and those that go together with it."""
        run = self._runs[action]
        if len(run) > 1 and all(self._known(each) for each in run):
            self._together(run)
            return
        for each in run:
            if each.kind in (Kind.SEND_F, Kind.SEND_B):
                self._send(each)
            else:
                self._receive(each)

    def send_pass(self, stage: int, batch: torch.Size, tensor: Tensor) -> None:
        """In evaluation: send what ``stage`` made of a batch of that shape."""
        peer = self._schedule.placement[stage + 1]
        if (stage, batch) not in self._passes:
            self._passes[stage, batch] = Form.of(tensor)
            self.line.tell(self._passes[stage, batch], peer)
        self.line.send(tensor.contiguous(), peer)

    def receive_pass(self, stage: int, batch: torch.Size) -> Tensor:
        """In evaluation: wait for what the stage before ``stage`` made."""
        peer, made = self._schedule.placement[stage - 1], (stage - 1, batch)  # `stage` has an entry of its own
        if made not in self._passes:
            self._passes[made] = self.line.ask(peer)
        tensor = self._passes[made].empty(self.line.device)
        self.line.channel.recv(tensor, peer, HOOK).wait()
        return tensor

    def _send(self, action: Action) -> None:
        peer = self._schedule.peer(self._place, action)
        if action in self._outbox:  # else it has left already
            self._leave(action, peer)
        if self.line.full(peer):
            self._post_ahead()
            self.line.drain(peer)

    def _leave(self, action: Action, peer: int) -> None:
        tensor = self._outbox.pop(action)
        self._left[peer] += 1
        if action.kind is Kind.SEND_F and action.stage not in self._told:
            self._told.add(action.stage)
            self._start(self.forms[action.stage].pack(self.line.device), peer)
        if tensor is not None:
            self._start(tensor, peer)

    def _start(self, tensor: Tensor, peer: int) -> None:
        self.line.note(self.line.channel.send(tensor, peer, HOOK), tensor, peer)

    def _receive(self, action: Action) -> None:
        peer = self._schedule.peer(self._place, action)
        if self._form(action) is None:
            self.forms[action.stage - 1] = self.line.ask(peer)
        self._reached[peer] += 1
        if self._posted[peer] < self._reached[peer]:
            self._post(peer, self._reached[peer])
        if self._ahead and self._posted[peer] < len(self._receives[peer]):
            self._stale.add(peer)

    def _post_ahead(self) -> None:
        for peer in self._stale:
            form = self._form(self._receives[peer][-1])
            count = AHEAD if form is None else max(AHEAD, AHEAD_BYTES // max(1, form.nbytes))
            self._post(peer, self._reached[peer] + count)
        self._stale.clear()

    def _post(self, peer: int, count: int) -> None:
        """Post the first ``count`` receives of the window's link, as far as their forms are known."""
        receives = self._receives[peer]
        while self._posted[peer] < min(count, len(receives)):
            action = receives[self._posted[peer]]
            form = self._form(action)
            if form is None:
                return
            self._posted[peer] += 1
            if action.kind is Kind.RECV_F or form.trains:
                tensor = form.empty(self.line.device)
                self._coming[action] = self.line.channel.recv(tensor, peer, HOOK), tensor

    def _together(self, run: tuple[Action, ...]) -> None:
        messages: list[Message] = []
        actions: list[Action] = []
        for action in run:
            message = self._message(action)
            if message is not None:
                messages.append(message)
                actions.append(action)
        for action, message, pending in zip(
            actions, messages, self.line.channel.messages(messages, HOOK) if messages else (), strict=True
        ):
            if message.away:
                self.line.note(pending, message.tensor, message.peer)
                self.line.drain(message.peer)
            else:
                self._coming[action] = pending, message.tensor

    def _message(self, action: Action) -> Message | None:
        peer = self._schedule.peer(self._place, action)
        if action.kind in (Kind.SEND_F, Kind.SEND_B):
            tensor = self._outbox.pop(action)
            return None if tensor is None else Message(tensor, peer, True)
        self._posted[peer] += 1
        self._reached[peer] += 1
        form = self._form(action)
        assert form is not None
        wanted = action.kind is Kind.RECV_F or form.trains
        return Message(form.empty(self.line.device), peer, False) if wanted else None

    def _known(self, action: Action) -> bool:
        return action.stage in self._told if action.kind is Kind.SEND_F else self._form(action) is not None

    def _form(self, action: Action) -> Form | None:
        """Of what a transfer carries: what a stage made, or the gradient of that."""
        before = action.kind in (Kind.RECV_F, Kind.SEND_B)
        return self.forms.get(action.stage - 1 if before else action.stage)


def _runs(program: Iterable[Action], *, together: bool) -> dict[Action, tuple[Action, ...]]:
    """The first of neighbouring transfers to all of them, the others to none; or each to itself."""
    found: dict[Action, tuple[Action, ...]] = {}
    for transfers, group in groupby(program, key=lambda action: action.kind in TRANSFERS):
        run = tuple(group)
        if transfers:
            found |= {
                action: (run if index == 0 else ()) if together else (action,) for index, action in enumerate(run)
            }
    return found
