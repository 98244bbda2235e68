"""The kernels of another machine, emulated: a pytest plugin that stands in for the compiled library.

``QJL_EMULATED_LIBRARY`` is a command that runs ``server.cpp`` in an emulator. Functions are called there by name, and
whatever memory of this process they touch is sent over and back, so that all tests run unchanged.
"""

import ctypes
import os
import resource
import shlex
import struct
import subprocess
from functools import cache
from threading import Lock

from qjl.ops.cpu import library

REQUEST = struct.Struct("64s3q")
MESSAGE = struct.Struct("3q")
FETCH, CHANGE, RETURN = range(3)


class Server:
    def __init__(self, command):
        self._process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, preexec_fn=_leave_room
        )
        self._lock = Lock()

    def call(self, function, arguments, returns_text):
        request = REQUEST.pack(function.encode(), *(*arguments, 0, 0)[:2], returns_text)
        with self._lock:
            self._process.stdin.write(request)
            return self._answer(function)

    def _answer(self, function):
        while True:
            kind, address, size = MESSAGE.unpack(self._receive(MESSAGE.size))
            if kind == FETCH:
                self._send_memory(function, address, size)
            elif kind == CHANGE:
                ctypes.memmove(address, self._receive(size), size)
            else:
                return self._receive(size) if size else address

    def _send_memory(self, function, address, size):
        try:
            os.write(self._process.stdin.fileno(), (ctypes.c_char * size).from_address(address))
        except OSError as error:
            raise MemoryError(f"{function} touches the page at {address:#x}, which is not there") from error

    def _receive(self, size):
        received = b""
        while len(received) < size:
            part = self._process.stdout.read(size - len(received))
            assert part, "the emulated library has ended"
            received += part
        return received


def _leave_room():
    """Lets the emulator lie where no memory of this process does: with no limit on its stack, Linux fills the address
    space from below."""
    resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Function:
    """As ctypes has them."""

    def __init__(self, server, name):
        self._server, self._name = server, name
        self.restype = ctypes.c_int

    def __call__(self, *arguments):
        return self._server.call(self._name, [_number(x) for x in arguments], self.restype is ctypes.c_char_p)


def _number(argument):
    if isinstance(argument, ctypes.c_int64):
        return argument.value
    if isinstance(argument, bytes):
        return ctypes.cast(argument, ctypes.c_void_p).value
    return ctypes.addressof(argument._obj)  # of byref(structure)


class Emulated:
    def __init__(self, command):
        self._server = Server(command)

    def __getattr__(self, name):
        function = Function(self._server, name)
        setattr(self, name, function)
        return function


@cache
def _load():
    emulated = Emulated(os.environ["QJL_EMULATED_LIBRARY"])
    assert library.fits(emulated), "the emulated library was built from other structs"
    library.declare(emulated)
    return emulated


library.load = _load
library.is_installed = lambda: True
