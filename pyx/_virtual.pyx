"""The world of a simulation: its dice, its clock, its network, and the book of what went wrong.

Theory of operation
-------------------
* A connection is two `Pipe`s. Bytes cross a pipe in segments, in their time; FIN comes after the last byte, RST
  whenever the seed says so, or when TCP would send one: after a close with unread bytes, or for bytes after a close.
* What happens is an event on a heap, ordered by virtual time and, within a moment, by the dice. Time only moves when
  events are run.
* A seed first draws the *world* (buffer and segment sizes, how likely each fault is: "swarm testing", Groce et al.,
  2012), then each single decision. The same seed, script and version give the same run.
* A pending error is told once, as a kernel does: to the first receive or send that looks. What comes after it is
  the end of the stream, or EPIPE.

`VirtualWorld` is the half of the simulated engine that knows no operations; the other half, the virtual kernel, is
``_simulated``.
"""
import collections
import errno as errno_module
import os

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from headrace._engine cimport Engine

cdef extern from "<errno.h>":
    enum: EAGAIN, EBADF, ECONNRESET, EMFILE, EPIPE

cdef enum:
    TRACE_LENGTH = 4000
    EVENT_LIMIT = 1 << 20    # events on their way; a runaway simulation ends with an error

# What is drawn from in a world that isn't calm. Sizes of one byte to a full window; segments from absurdly small, over
# an Ethernet frame's, to everything at once.
cdef tuple BUFFER_SIZES = (256, 2048, 16384, 65536)
cdef tuple SEGMENT_SIZES = (7, 100, 1448, 16384, 65536)
cdef double FIRST_MOMENT = 1000.0


class SimulationError(AssertionError):
    """What a simulation found; the text ends with the seed that replays it."""

    def __init__(self, text, seed):
        super().__init__(f"{text} [seed {seed}]")
        self.seed = seed


class ContractViolation(SimulationError):
    """Somebody broke a rule of the engine contract."""


class Deadlock(SimulationError):
    """Nothing can happen any more, and somebody waits without a limit."""


class Faults:
    """How hard the world is: probabilities from 0 to 1, and two times in seconds.

    ==================  ==============================================================================
    short_receive       a receive brings fewer bytes than are there
    short_send          a send takes fewer bytes than there is room for
    no_buffers          a receive ends with ENOBUFS although a block is posted
    accept_limit        an accept ends with EMFILE
    reset               a connection is reset by the network at some time
    overflow            a completion goes to the overflow list although there is room
    cancel_race         a cancelled operation succeeds first
    early_end           a multishot operation ends, for no reason, with a success that lacks MORE
    would_block         a silent send is told EAGAIN although there is room
    latency             the most a segment takes to arrive
    delay               the most a completion takes to come
    ==================  ==============================================================================
    """

    NAMES = ("short_receive", "short_send", "no_buffers", "accept_limit", "reset", "overflow", "cancel_race",
             "early_end", "would_block", "latency", "delay")

    def __init__(self, **values):
        for name in self.NAMES:
            setattr(self, name, float(values.pop(name, 0.0)))
        if values:
            raise TypeError(f"there is no fault {', '.join(values)}")

    def __repr__(self):
        return "Faults(" + ", ".join(f"{name}={getattr(self, name):g}" for name in self.NAMES) + ")"

    def replace(self, **values):
        """A copy with some values changed."""
        return Faults(**({name: getattr(self, name) for name in self.NAMES} | values))


NO_FAULTS = Faults(latency=50e-6)


@cython.final
cdef class SeededRandom:
    """Random numbers that are the same for a seed on every machine and in every version (splitmix64).

    Parameters
    ----------
    seed : int
        Any integer; taken modulo 2**64.
    """

    def __init__(self, seed):
        self.state = <uint64_t>(int(seed) & 0xffffffffffffffff)

    cdef uint64_t next(self) noexcept:
        cdef uint64_t z
        self.state += <uint64_t>0x9e3779b97f4a7c15
        z = self.state
        z = (z ^ (z >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
        z = (z ^ (z >> 27)) * <uint64_t>0x94d049bb133111eb
        return z ^ (z >> 31)

    cdef uint64_t below(self, uint64_t limit) noexcept:
        # The bias is limit / 2**64: nothing that a simulation could see.
        return self.next() % limit if limit else 0

    cdef double fraction(self) noexcept:
        return <double>(self.next() >> 11) * (1.0 / <double>(<uint64_t>1 << 53))

    cdef bint chance(self, double probability) noexcept:
        # Without a draw for what can't happen: a world without a fault costs nothing for it.
        return probability > 0 and self.fraction() < probability

    def integer(self, low, high):
        """An integer, low <= n <= high."""
        if high < low:
            raise ValueError("high is below low")
        return low + self.below(<uint64_t>(high - low + 1))

    def uniform(self, double low, double high):
        """A float, low <= x < high."""
        return low + (high - low) * self.fraction()

    def likely(self, double probability):
        """True with this probability."""
        return self.chance(probability)

    def choice(self, sequence):
        """One of its items."""
        return sequence[<Py_ssize_t>self.below(<uint64_t>len(sequence))]


@cython.final
cdef class Pipe:
    """One direction of a virtual connection: the sender's buffer, the wire, the receiver's buffer."""

    def __dealloc__(self):
        free(self.memory)

    def __repr__(self):
        state = f", {self.broken}" if self.broken else ", finished" if self.finished else ""
        return f"<Pipe written {self.written} arrived {self.arrived} taken {self.taken}{state}>"


@cython.final
cdef class Socket:
    """What a virtual descriptor refers to.

    ``told`` is the last connection error (a positive errno) that was told to its owner, or 0; ``operations`` are the
    kinds of those in flight.
    """

    def __init__(self):
        self.fd = -1
        self.receive = self.send = self.poll = NO_SLOT

    @property
    def incoming(self):
        """The Pipe whose bytes are received here, or None for a listener."""
        return self.incoming

    @property
    def outgoing(self):
        """The Pipe into which is sent here, or None for a listener."""
        return self.outgoing

    @property
    def operations(self):
        """The kinds of the operations that are on it now."""
        named = (("receive", self.receive), ("send", self.send), ("poll", self.poll))
        return [name for name, slot in named if slot != NO_SLOT]

    def __repr__(self):
        if self.listening:
            return f"<Socket {self.fd} listening at {self.address!r}, {len(self.backlog)} waiting>"
        return f"<Socket {self.fd} in {self.incoming!r} out {self.outgoing!r} {self.operations}>"


cdef class VirtualWorld(Engine):
    """The world half of `SimulatedEngine`: virtual descriptors and their network. Not used by itself."""

    def __init__(self, seed, faults, send_limit, receive_limit, segment, int descriptors, bint trace, probabilities):
        self.name = "simulated"
        self.seed = seed
        self.random = SeededRandom(seed)
        self.clock = FIRST_MOMENT
        self.injected = dict.fromkeys(Faults.NAMES, 0)
        self.trace = collections.deque(maxlen=TRACE_LENGTH) if trace else None
        self.sockets = {}
        self.listeners = {}
        self.next_fd = FIRST_DESCRIPTOR
        self.next_port = 49152
        self.descriptor_limit = descriptors
        self.calm = faults is not None
        self.set_faults((faults if self.calm else self.draw_faults()).replace(**probabilities))
        self.draw_network(send_limit, receive_limit, segment)

    def draw_faults(self):
        """Swarm testing: each seed leaves some faults out altogether, and is hard on others."""
        cdef SeededRandom random = self.random
        values = {}
        for name in Faults.NAMES:
            values[name] = 0.0 if random.chance(0.4) else random.choice((0.02, 0.1, 0.3))
        # These three have scales of their own.
        values["reset"] = 0.0 if random.chance(0.6) else random.choice((0.2, 0.5))
        values["latency"] = random.choice((0.0, 20e-6, 200e-6, 5e-3))
        values["delay"] = random.choice((0.0, 0.0, 20e-6, 1e-3))
        return Faults(**values)

    def set_faults(self, faults):
        """Takes new probabilities from now on, for instance a calm world for the end of a scenario."""
        self.faults = faults
        self.p_short_receive = faults.short_receive
        self.p_short_send = faults.short_send
        self.p_no_buffers = faults.no_buffers
        self.p_accept_limit = faults.accept_limit
        self.p_reset = faults.reset
        self.p_overflow = faults.overflow
        self.p_cancel_race = faults.cancel_race
        self.p_early_end = faults.early_end
        self.p_would_block = faults.would_block
        self.max_latency = faults.latency
        self.max_delay = faults.delay

    def draw_network(self, send_limit, receive_limit, segment):
        cdef SeededRandom random = self.random
        cdef tuple sizes = (65536,) if self.calm else BUFFER_SIZES
        cdef tuple segments = (65536,) if self.calm else SEGMENT_SIZES
        self.reuse_descriptors = self.calm or random.chance(0.5)
        self.default_send_limit = send_limit or random.choice(sizes)
        self.default_receive_limit = receive_limit or random.choice(sizes)
        self.default_segment = segment or random.choice(segments)

    def __dealloc__(self):
        self.drop_events()
        free(self.events)

    cdef void drop_events(self) noexcept:
        cdef int i, n = self.event_count
        self.event_count = 0
        for i in range(n):
            Py_XDECREF(self.events[i].target)

    # ---- what the kernel half does --------------------------------------------------------------------------

    cdef int poke(self, Socket socket) except -1:
        """Something about the socket has changed: its operations may go on."""
        raise NotImplementedError

    cdef int operation_event(self, Event *event) except -1:
        """A WORK or CANCEL event is due."""
        raise NotImplementedError

    cdef list held_back(self, int fd):
        """The kinds of the operations on `fd` that aren't with the kernel now."""
        raise NotImplementedError

    # ---- the clock -------------------------------------------------------------------------------------------

    cdef double now(self) noexcept:
        return self.clock

    def time(self):
        """Virtual seconds."""
        return self.clock

    # ---- virtual descriptors --------------------------------------------------------------------------------

    def socketpair(self):
        """Two connected virtual descriptors."""
        near, far = self.make_pair(("virtual", 0), ("virtual", 1))
        self.install(near)
        self.install(far)
        return near.fd, far.fd

    def listen(self, address, *, int backlog=100):
        """A virtual descriptor that accepts at `address` (anything hashable). OSError EADDRINUSE if it's taken."""
        cdef Socket socket
        if address in self.listeners:
            raise OSError(errno_module.EADDRINUSE, os.strerror(errno_module.EADDRINUSE))
        socket = Socket()
        socket.listening = True
        socket.address = address
        socket.backlog = collections.deque()
        socket.backlog_limit = max(1, backlog)
        self.install(socket)
        self.listeners[address] = socket
        return socket.fd

    def connect(self, address):
        """A virtual descriptor that is connected to the listener at `address`, at once; the listener hears of it later.

        ConnectionRefusedError if nobody listens, TimeoutError if its backlog is full, OSError EMFILE beyond the limit
        of descriptors.
        """
        cdef Socket listener = self.listeners.get(address)
        cdef Socket near, far
        if listener is None:
            raise ConnectionRefusedError(errno_module.ECONNREFUSED, os.strerror(errno_module.ECONNREFUSED))
        if len(listener.backlog) >= listener.backlog_limit:
            raise TimeoutError(errno_module.ETIMEDOUT, os.strerror(errno_module.ETIMEDOUT))
        self.next_port += 1
        near, far = self.make_pair(("client", self.next_port), address)
        self.install(near)
        listener.backlog.append((far, False))
        self.schedule(self.latency(), ARRIVAL, 0, 0, listener)
        return near.fd

    def socket(self, int fd):
        """The Socket behind a virtual descriptor, or None. It stays readable after the descriptor is closed."""
        return self.sockets.get(fd)

    def descriptors(self):
        """The virtual descriptors that are open, a sorted list."""
        return sorted(self.sockets)

    def reset(self, int fd):
        """The network resets the connection of `fd`, both ends, now."""
        self.break_connection(self.open_socket(fd), "reset by the script")

    def write(self, int fd, data):
        """Sends without an operation, as much as fits: how many bytes. BlockingIOError when nothing fits."""
        cdef Socket socket = self.open_socket(fd)
        cdef const unsigned char[::1] view = data
        cdef int32_t error = self.send_error(socket)
        if error:
            socket.told = error
            raise OSError(error, os.strerror(error))
        if view.shape[0] == 0:
            return 0
        n = self.accept_bytes(socket, <const char *>&view[0], <uint32_t>min(view.shape[0], 1 << 30))
        if n == 0:
            raise BlockingIOError(EAGAIN, os.strerror(EAGAIN))
        return n

    def read(self, int fd, size_t limit=65536):
        """Receives without an operation: bytes, empty at the end. BlockingIOError when nothing is there."""
        cdef Socket socket = self.open_socket(fd)
        cdef Pipe pipe = socket.incoming
        cdef size_t i, n = min(limit, <size_t>(pipe.arrived - pipe.taken))
        cdef bytearray data
        if n == 0:
            error = self.take_error(socket)
            if error:
                socket.told = error
                raise OSError(error, os.strerror(error))
            if pipe.finished or socket.reset_seen:
                return b""
            raise BlockingIOError(EAGAIN, os.strerror(EAGAIN))
        data = bytearray(n)
        for i in range(n):
            data[i] = <uint8_t>pipe.memory[(pipe.taken + i) & pipe.mask]
        pipe.taken += n
        self.move(pipe)
        return bytes(data)

    def close_virtual(self, int fd):
        """Closes a virtual descriptor, as ``close(2)``; ContractViolation if operations are on it."""
        error = self.close_descriptor(fd)
        self.raise_violation()
        if error:
            raise OSError(-error, os.strerror(-error))

    def shutdown_virtual(self, int fd):
        """``shutdown(fd, SHUT_WR)``."""
        error = self.shutdown_write(fd)
        if error:
            raise OSError(-error, os.strerror(-error))

    def open_socket(self, int fd):
        socket = self.sockets.get(fd)
        if socket is None:
            raise OSError(EBADF, os.strerror(EBADF))
        return socket

    cdef Socket socket_of(self, int fd):
        return self.sockets.get(fd)

    cdef Socket install(self, Socket socket):
        """Gives it a descriptor: the lowest free one as a kernel does, or, by seed, one that was never used."""
        cdef int fd = FIRST_DESCRIPTOR
        if len(self.sockets) >= self.descriptor_limit:
            raise OSError(EMFILE, os.strerror(EMFILE))
        if self.reuse_descriptors:
            while fd in self.sockets:
                fd += 1
        else:
            fd = self.next_fd
            self.next_fd += 1
        socket.fd = fd
        self.sockets[fd] = socket
        return socket

    cdef tuple make_pair(self, object near, object far):
        cdef Socket one = Socket(), other = Socket()
        one.outgoing = other.incoming = self.make_pipe()
        one.incoming = other.outgoing = self.make_pipe()
        one.outgoing.writer = other.outgoing.reader = one
        one.outgoing.reader = other.outgoing.writer = other
        one.address = other.peer_address = near
        one.peer_address = other.address = far
        if self.random.chance(self.p_reset):
            self.schedule(self.random.fraction() * self.random.choice((1e-4, 1e-3, 20e-3)), FAULT, 0, 0, one)
        return one, other

    cdef Pipe make_pipe(self):
        cdef Pipe pipe = Pipe.__new__(Pipe)
        cdef uint32_t size = 256
        pipe.send_limit = self.default_send_limit
        pipe.receive_limit = self.default_receive_limit
        pipe.segment = self.default_segment
        while size < pipe.send_limit + pipe.receive_limit:
            size *= 2
        pipe.mask = size - 1
        pipe.memory = <char *>malloc(size)
        if pipe.memory == NULL:
            raise MemoryError
        return pipe

    cdef int close_descriptor(self, int fd) noexcept:
        cdef Socket socket = self.sockets.get(fd)
        if socket is None:
            self.remember(f"descriptor {fd} was closed, but isn't open")
            return -EBADF
        waiting = socket.operations + self.held_back(fd)
        if waiting:
            self.remember(f"descriptor {fd} was closed under its {' and '.join(waiting)}")
        try:
            self.close_socket(socket)
        except BaseException as error:
            self.remember(f"closing descriptor {fd} failed: {error!r}")
        return 0

    cdef int shutdown_write(self, int fd) noexcept:
        cdef Socket socket = self.sockets.get(fd)
        if socket is None:
            self.remember(f"descriptor {fd} was shut down, but isn't open")
            return -EBADF
        if socket.outgoing is None or socket.reset_seen:
            return -errno_module.ENOTCONN
        if socket.send != NO_SLOT:
            self.remember(f"descriptor {fd} was shut down for writing under its send")
        try:
            self.shut(socket)
        except BaseException as error:
            self.remember(f"shutting down descriptor {fd} failed: {error!r}")
        return 0

    cdef int unsent(self, int fd) noexcept:
        cdef Socket socket = self.sockets.get(fd)
        if socket is None or socket.outgoing is None:
            return -EBADF
        if socket.outgoing.broken is not None:
            return 0
        return <int>(socket.outgoing.written - socket.outgoing.arrived)

    cdef int close_socket(self, Socket socket) except -1:
        cdef Pipe incoming = socket.incoming
        cdef Socket waiting
        del self.sockets[socket.fd]
        self.note(f"close {socket.fd}")
        socket.fd = -1
        socket.closed = True
        if socket.listening:
            del self.listeners[socket.address]
            for waiting, _ in socket.backlog:
                self.break_connection(waiting, "its listener was closed")
            socket.backlog.clear()
        elif incoming.broken is None:
            if incoming.arrived > incoming.taken:
                # RFC 2525, 2.17: closing with unread data resets, and what was still to be sent is lost.
                self.break_connection(socket, "closed with unread data")
            else:
                self.shut(socket)
        return 0

    cdef int shut(self, Socket socket) except -1:
        if not socket.outgoing.shut:
            socket.outgoing.shut = True
            self.move(socket.outgoing)
        return 0

    # ---- the network ----------------------------------------------------------------------------------------

    cdef double latency(self) noexcept:
        return self.random.fraction() * self.max_latency

    cdef double delay(self) noexcept:
        return self.random.fraction() * self.max_delay if self.max_delay > 0 and self.random.chance(0.5) else 0.0

    cdef uint32_t accept_bytes(self, Socket socket, const char *data, uint32_t length) except? 0:
        """Into the sender's buffer, as much as fits."""
        cdef Pipe pipe = socket.outgoing
        cdef uint32_t room = pipe.send_limit - <uint32_t>(pipe.written - pipe.arrived)
        cdef uint32_t n = min(length, room), start = <uint32_t>pipe.written & pipe.mask, first
        first = min(n, pipe.mask + 1 - start)
        memcpy(pipe.memory + start, data, first)
        memcpy(pipe.memory, data + first, n - first)
        pipe.written += n
        if n:
            self.move(pipe)
        return n

    cdef int move(self, Pipe pipe) except -1:
        """Sets the next segment, or the FIN, on its way."""
        if pipe.moving or pipe.broken is not None:
            return 0
        if pipe.written > pipe.arrived:
            if pipe.arrived - pipe.taken < pipe.receive_limit or pipe.reader.closed:
                pipe.moving = True
                self.schedule(self.latency(), SEGMENT, 0, 0, pipe)
        elif pipe.shut and not pipe.finished:
            pipe.moving = True
            self.schedule(self.latency(), FINISH, 0, 0, pipe)
        return 0

    cdef int segment_arrives(self, Pipe pipe) except -1:
        cdef uint64_t n, limit
        pipe.moving = False
        if pipe.broken is not None:
            return 0
        if pipe.reader.closed:
            return self.break_connection(pipe.reader, "data came after the close")
        n = pipe.written - pipe.arrived
        # Long transfers in tiny segments would only cost time: a few hundred are as good as thousands.
        limit = max(<uint64_t>pipe.segment, n // 16)
        n = min(n, pipe.receive_limit - (pipe.arrived - pipe.taken))
        n = min(n, 1 + self.random.below(limit) if self.random.chance(0.3) else limit)
        pipe.arrived += n
        self.mix(n)
        self.poke(pipe.reader)
        self.poke(pipe.writer)
        return self.move(pipe)

    cdef int fin_arrives(self, Pipe pipe) except -1:
        pipe.moving = False
        if pipe.broken is None:
            if pipe.written > pipe.arrived:
                return self.move(pipe)
            pipe.finished = True
            self.poke(pipe.reader)
        return 0

    cdef int break_connection(self, Socket socket, str reason) except -1:
        """RST: nothing more crosses; both ends hear of it, each in its own time."""
        cdef Pipe pipe
        cdef Socket end
        if socket.incoming.broken is not None:
            return 0
        self.note(f"broken {socket.fd}: {reason}")
        for pipe in (socket.incoming, socket.outgoing):
            pipe.broken = reason
            end = pipe.reader
            if not end.closed:
                self.schedule(self.latency(), RESET, 0, 0, end)
        return 0

    cdef int reset_arrives(self, Socket socket) except -1:
        cdef Pipe pipe = socket.incoming
        if socket.closed:
            return 0
        # As Linux's tcp_reset(): EPIPE once FIN had come, else ECONNRESET.
        socket.error = EPIPE if pipe.finished else ECONNRESET
        socket.reset_seen = True
        if self.random.chance(0.5):
            pipe.taken = pipe.arrived    # some stacks drop what wasn't received yet
        return self.poke(socket)

    cdef int connection_arrives(self, Socket listener) except -1:
        cdef int i
        if listener.closed:
            return 0
        for i in range(len(listener.backlog)):
            socket, arrived = listener.backlog[i]
            if not arrived:
                listener.backlog[i] = (socket, True)
                break
        return self.poke(listener)

    # ---- events ---------------------------------------------------------------------------------------------

    cdef int schedule(self, double delay, uint32_t kind, uint32_t slot, uint32_t generation, object target) except -1:
        cdef Event event
        cdef int i, parent
        if self.event_count == self.event_capacity:
            if self.event_count >= EVENT_LIMIT:
                raise SimulationError(f"{EVENT_LIMIT} events are on their way", self.seed)
            self.events = <Event *>grow(self.events, &self.event_capacity, sizeof(Event))
        event.at = self.clock + delay
        event.tie = self.random.next()
        event.kind = kind
        event.slot = slot
        event.generation = generation
        event.target = <PyObject *>target
        Py_INCREF(target)
        i = self.event_count
        self.event_count += 1
        while i:
            parent = (i - 1) // 2
            if not earlier(&event, &self.events[parent]):
                break
            self.events[i] = self.events[parent]
            i = parent
        self.events[i] = event
        return 0

    cdef Event pop_event(self) noexcept:
        cdef Event first = self.events[0], last
        cdef int i = 0, child
        self.event_count -= 1
        last = self.events[self.event_count]
        while True:
            child = 2 * i + 1
            if child >= self.event_count:
                break
            if child + 1 < self.event_count and earlier(&self.events[child + 1], &self.events[child]):
                child += 1
            if not earlier(&self.events[child], &last):
                break
            self.events[i] = self.events[child]
            i = child
        if self.event_count:
            self.events[i] = last
        return first

    cdef int run_events(self, double until) except -1:
        """Everything up to this moment; what it brings about in the same span as well."""
        cdef Event event
        while self.event_count and self.events[0].at <= until:
            event = self.pop_event()
            if event.at > self.clock:
                self.clock = event.at
            self.steps += 1
            try:
                self.happen(&event)
            finally:
                Py_DECREF(<object>event.target)
        return 0

    cdef int happen(self, Event *event) except -1:
        self.mix(event.kind)
        if event.kind == SEGMENT:
            return self.segment_arrives(<Pipe>event.target)
        if event.kind == FINISH:
            return self.fin_arrives(<Pipe>event.target)
        if event.kind == ARRIVAL:
            return self.connection_arrives(<Socket>event.target)
        if event.kind == RESET:
            return self.reset_arrives(<Socket>event.target)
        if event.kind == FAULT:
            if (<Socket>event.target).incoming.broken is None:
                self.inject("reset")
            return self.break_connection(<Socket>event.target, "reset by the network")
        return self.operation_event(event)

    # ---- what a socket is ready for -------------------------------------------------------------------------

    cdef bint can_receive(self, Socket socket) noexcept:
        if socket.listening:
            return len(socket.backlog) > 0 and socket.backlog[0][1]
        return (socket.incoming.arrived > socket.incoming.taken or socket.error != 0 or socket.incoming.finished
                or socket.reset_seen)

    cdef bint can_send(self, Socket socket) noexcept:
        cdef Pipe pipe = socket.outgoing
        return pipe.shut or socket.reset_seen or pipe.written - pipe.arrived < pipe.send_limit

    cdef int32_t take_error(self, Socket socket) noexcept:
        """A pending error is told once. What comes after it is EOF, or EPIPE."""
        cdef int error = socket.error
        socket.error = 0
        return error

    cdef int32_t send_error(self, Socket socket) noexcept:
        cdef int32_t error = self.take_error(socket)
        if error == 0 and (socket.outgoing.shut or socket.reset_seen):
            error = EPIPE
        return error

    # ---- the book -------------------------------------------------------------------------------------------

    def remember(self, text):
        """The first violation is kept: where it happened it may not be raised, or somebody may swallow it."""
        self.note("VIOLATION " + text)
        if self.violation is None:
            self.violation = ContractViolation(text, self.seed)

    def raise_violation(self):
        """Raises the violation that was found, if there is one."""
        if self.violation is not None:
            raise self.violation

    cdef int violated(self, str text) except -1:
        self.remember(text)
        raise self.violation

    cdef int inject(self, str name) except -1:
        self.injected[name] += 1
        return 0

    cdef int note(self, str text) except -1:
        if self.trace is not None:
            self.trace.append(f"{(self.clock - 1000.0) * 1e3:10.4f} ms  {text}")
        return 0

    cdef int mix(self, uint64_t value) noexcept:
        """The digest is equal in two runs that went the same way."""
        self.digest = (self.digest ^ value) * <uint64_t>0x9e3779b97f4a7c15 + <uint64_t>(self.clock * 1e9)
        return 0


cdef inline bint earlier(Event *one, Event *other) noexcept:
    return one.at < other.at or (one.at == other.at and one.tie < other.tie)
