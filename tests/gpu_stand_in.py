"""A GPU's streams without a GPU, for tests of what orders them.

What a stream is given is run late: when somebody waits for it, or by chance, one job of one stream at a time, in the order
of that stream and never past an event it waits for. Some streams are seldom chosen, so that whatever runs without waiting
for them comes too soon: a copy used before its event holds other bits.
"""

import random

import torch


class Stream:
    def __init__(self, weight):
        self.work, self.done, self.weight = [], 0, weight

    def blocked(self):
        job = self.work[self.done]
        return isinstance(job, Event) and not job.reached()


class Event:
    def __init__(self, device, stream):
        self.device, self.stream, self.position = device, stream, len(stream.work)

    def reached(self):
        return self.stream.done >= self.position

    def query(self):
        if not self.device.idle() and self.device.rng.random() < 0.25:
            self.device.run_one()
        return self.reached()

    def synchronize(self):
        self.device.waits += 1
        while not self.reached():
            self.device.run_one()


class Managed:
    """Unified memory: `here` says which bytes are on the device."""

    def __init__(self, nbytes):
        self.bytes, self.here = torch.zeros(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.bool)

    def address(self):
        return self.bytes.data_ptr()


class StandIn:
    """Has pyfastpeft.optim.cuda_device.CudaDevice's methods; its memory and the host's are the same.

    room     bytes of its own
    pins     whether host memory can be pinned
    managed  whether it has unified memory
    deaf     number of a stream (0: the kernels') that waits for no event: a mistake to be found
    """

    def __init__(self, seed=0, room=1 << 40, pins=True, managed=True, deaf=None):
        self.rng, self.room, self.pins, self.managed, self.deaf = random.Random(seed), room, pins, managed, deaf
        self.waits, self.pinned, self.blocks = 0, {}, []
        self.device, self.streams = torch.device("cpu"), []
        self.kernels = self.new_stream()

    def new_stream(self):
        self.streams.append(Stream(self.rng.choice((0.02, 1.0, 50.0))))
        return self.streams[-1]

    def current_stream(self):
        return self.kernels

    def record(self, stream=None):
        return Event(self, self.kernels if stream is None else stream)

    def wait(self, stream, event):
        if self.streams.index(stream) != self.deaf:
            stream.work.append(event)

    def give(self, job, stream=None):
        (self.kernels if stream is None else stream).work.append(job)

    def run_one(self):
        able = [s for s in self.streams if s.done < len(s.work) and not s.blocked()]
        assert able, "every stream waits for another"
        (stream,) = self.rng.choices(able, [s.weight for s in able])
        job, stream.work[stream.done] = stream.work[stream.done], None
        stream.done += 1
        if not isinstance(job, Event):
            job()

    def idle(self):
        return all(s.done == len(s.work) for s in self.streams)

    def run(self):
        while not self.idle():
            self.run_one()

    def begin_copy(self, stream, target, source):
        self.give(lambda: target.copy_(source), stream)

    def copy(self, target, source):
        while self.kernels.done < len(self.kernels.work):
            self.run_one()
        target.copy_(source)

    def free_bytes(self):
        return self.room

    def allocate(self, nbytes):
        if nbytes > self.room:
            raise torch.OutOfMemoryError("the stand-in is full")
        self.room -= nbytes
        return torch.zeros(nbytes, dtype=torch.uint8)

    def has_managed(self):
        return self.managed

    def allocate_managed(self, nbytes):
        assert nbytes <= self.room, "unified memory beyond what is free"
        self.room -= nbytes
        self.blocks.append(Managed(nbytes))
        return self.blocks[-1]

    def begin_prefetch(self, stream, managed, offset, nbytes):
        self.give(lambda: managed.here[offset : offset + nbytes].fill_(True), stream)

    def others_need_room(self):
        """The driver moves all unified memory to the host."""
        for block in self.blocks:
            block.here.fill_(False)

    def is_here(self, address, nbytes):
        for block in self.blocks:
            at = address - block.address()
            if 0 <= at < len(block.bytes):
                return bool(block.here[at : at + nbytes].all())
        return True

    def pin(self, address, nbytes):
        if self.pins:
            self.pinned[address] = nbytes
        return self.pins

    def unpin(self, address):
        del self.pinned[address]
