"""Instructions of whole warps and programs: shuffles, reductions, barriers and products of matrices."""

from functools import partial

import numpy as np

from emulation.ptx_memory import active, load, store
from emulation.ptx_numbers import decoded, integer, is_float, size_of
from emulation.ptx_steps import Makers
from emulation.ptx_text import WARP, Fault, Unknown

MAKERS = Makers()

LANES = np.arange(WARP)
ALL = 2**32 - 1


def _by_warp(machine, bits):
    """``[..., threads] -> [..., warps, 32]``."""
    return np.broadcast_to(bits, (*bits.shape[:-1], machine.threads)).reshape(*bits.shape[:-1], -1, WARP)


def _require_all_members(machine, members):
    if (members(machine) != ALL).any():
        raise Unknown("a warp without some of its lanes")


# Shuffles and reductions


@MAKERS.of("shfl")
def _shuffle(operands):
    to, *is_in_range = operands.texts[0].split("|")
    write = operands.write(to, "b32")
    write_range = operands.write(is_in_range[0], "pred") if is_in_range else None
    sources = [operands.read(place, "b32") for place in (1, 2, 3)]
    members = operands.read(4, "b32")
    mode = operands.modifiers[1]

    def run(machine):
        _require_all_members(machine, members)
        bits, by, clamp = (_by_warp(machine, source(machine)) for source in sources)
        lane, inside = _source_lane(mode, by.astype(np.int64), clamp.astype(np.int64))
        write(machine, np.take_along_axis(bits, lane, 1).reshape(-1))
        if write_range:
            write_range(machine, inside.reshape(-1))

    return run


def _source_lane(mode, by, clamp):
    """From which lane each takes, and whether that is in its segment."""
    by, segment, clamp = by & 31, (clamp >> 8) & 31, clamp & 31
    lowest = LANES & segment
    highest = lowest | (clamp & ~segment)
    lane = {"up": LANES - by, "down": LANES + by, "bfly": LANES ^ by, "idx": lowest | (by & ~segment)}[mode]
    inside = lane >= highest if mode == "up" else lane <= highest
    return np.where(inside, lane, LANES), inside


@MAKERS.of("redux")
def _reduce(operands):
    """Over all lanes."""
    kind = operands.type
    if is_float(kind):
        raise Unknown("reductions of floats")
    functions = {
        "add": partial(np.sum, dtype=integer(kind)),
        "min": np.min,
        "max": np.max,
        "and": np.bitwise_and.reduce,
        "or": np.bitwise_or.reduce,
        "xor": np.bitwise_xor.reduce,
    }
    function = functions[operands.modifiers[1]]
    write, read, members = operands.write(0, kind), operands.read(1, kind), operands.read(2, "b32")

    def run(machine):
        _require_all_members(machine, members)
        reduced = function(_by_warp(machine, read(machine)), axis=1)
        write(machine, np.repeat(reduced, WARP))

    return run


@MAKERS.of("vote")
def _vote(operands):
    kinds = {"all": "pred", "any": "pred", "ballot": "b32"}
    name = operands.modifiers[1]
    if name not in kinds:
        raise Unknown("this vote")
    write, read, members = operands.write(0, kinds[name]), operands.read(1, "pred"), operands.read(2, "b32")

    def run(machine):
        _require_all_members(machine, members)
        votes = _by_warp(machine, read(machine))
        if name == "ballot":
            result = (votes.astype(np.uint64) << LANES.astype(np.uint64)).sum(1).astype(np.uint32)
        else:
            result = votes.all(1) if name == "all" else votes.any(1)
        write(machine, np.repeat(result, WARP))

    return run


# Barriers


@MAKERS.of("bar", "barrier")
def _barrier(operands):
    if operands.has("red", "arrive") or (len(operands.texts) > 1 and "warp" not in operands.modifiers):
        raise Unknown("a barrier of some threads")
    return _nothing(operands) if operands.has("warp") else _meet


def _meet(machine):
    """What was written before is there for all threads of the program."""
    machine.turns[active(machine)] += 1


@MAKERS.of("fence", "membar", "griddepcontrol", "prefetch", "nanosleep")
def _nothing(operands):
    """What comes after a step sees all of it; and threads wait for each other before one that they do together."""
    return lambda machine: None


@MAKERS.of("trap")
def _trap(operands):
    def run(machine):
        raise Fault("a program gives up")

    return run


# Matrices in shared memory


def _rows_of(machine, addresses, matrix):
    """Addresses of the rows of one matrix, ``[warps, 8]``."""
    return _by_warp(machine, addresses)[:, 8 * matrix : 8 * matrix + 8]


def _require_aligned(addresses):
    if (addresses % 16).any():
        raise Fault("a row of a matrix is not aligned to 16 bytes")


def _halves_at(rows, is_transposed):
    """Addresses of a thread's two halves, ``[threads]`` each."""
    group, place = LANES // 4, LANES % 4
    if is_transposed:
        return [(rows[:, 2 * place + i] + 2 * group).reshape(-1) for i in range(2)]
    first = rows[:, group] + 4 * place
    return [(first + 2 * i).reshape(-1) for i in range(2)]


def _matrices(operands):
    if "m8n8" not in operands.modifiers or operands.type != "b16":
        raise Unknown("matrices of this shape")
    return int(next(x for x in operands.modifiers if x in ("x1", "x2", "x4"))[1:])


@MAKERS.of("ldmatrix")
def _load_matrices(operands):
    count, address, is_transposed = _matrices(operands), operands.address(1), operands.has("trans")
    writes = [operands.write(text, "b32") for text in operands.vector(0)]

    def run(machine):
        addresses = np.broadcast_to(address(machine), machine.threads)
        for matrix in range(count):
            rows = _rows_of(machine, addresses, matrix)
            _require_aligned(rows if machine.mask is None else rows[machine.mask.reshape(-1, WARP)[:, 0]])
            low, high = (load(machine, "shared", at, 2)[0] for at in _halves_at(rows, is_transposed))
            writes[matrix](machine, low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16)))

    return run


@MAKERS.of("stmatrix")
def _store_matrices(operands):
    count, address, is_transposed = _matrices(operands), operands.address(0), operands.has("trans")
    reads = [operands.read(text, "b32") for text in operands.vector(1)]

    def run(machine):
        addresses = np.broadcast_to(address(machine), machine.threads)
        for matrix in range(count):
            rows, bits = _rows_of(machine, addresses, matrix), reads[matrix](machine)
            _require_aligned(rows if machine.mask is None else rows[machine.mask.reshape(-1, WARP)[:, 0]])
            low, high = _halves_at(rows, is_transposed)
            store(machine, "shared", low, [bits.astype(np.uint16)])
            store(machine, "shared", high, [(bits >> np.uint32(16)).astype(np.uint16)])

    return run


# Products of matrices


def _numbers(bits, kind):
    """``[registers, threads]`` as float32 ``[registers, warps, 8, 4, in a register]``."""
    if kind == "tf32":
        numbers = decoded("tf32")(bits)[..., None]
    elif kind in ("f16", "bf16"):
        numbers = np.moveaxis(decoded(f"{kind}x2")(bits), 0, -1)
    elif kind in ("s8", "u8"):
        numbers = bits[..., None].view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)
    else:
        raise Unknown(f"products of {kind}")
    return numbers.reshape(len(bits), -1, 8, 4, numbers.shape[-1])


def _left(bits, kind):
    """Float32 ``[warps, 16, K]``."""
    x = _numbers(bits, kind)
    x = x.reshape(-1, 2, *x.shape[1:])  # half of the columns, half of the rows
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(x.shape[2], 16, -1)


def _right(bits, kind):
    """Float32 ``[warps, K, 8]``."""
    x = _numbers(bits, kind)
    return x.transpose(1, 0, 3, 4, 2).reshape(x.shape[1], -1, 8)


def _sums(numbers):
    """``[4, threads] -> [warps, 16, 8]``."""
    x = numbers.reshape(2, 2, -1, 8, 4)
    return x.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)


def _by_thread(sums):
    """The way back."""
    return sums.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)


@MAKERS.of("mma")
def _product(operands):
    """``D = A B + C`` of a warp, 16 by 8. Products are exact in float32, and so are sums of those of bytes."""
    if not operands.has("m16n8k16", "m16n8k8", "m16n8k32"):
        raise Unknown("a product of this shape")
    out, of_left, of_right, added = operands.modifiers[-4:]
    if out != added or out not in _SUMS:
        raise Unknown(f"a product that gives {out}")
    write, before = _written_sums(operands, 0, out), _read_sums(operands, 3, out)
    left, right = ([operands.read(text, "b32") for text in operands.vector(place)] for place in (1, 2))

    def run(machine):
        a, b = _stacked(machine, left), _stacked(machine, right)
        product = np.matmul(_left(a, of_left), _right(b, of_right)).astype(_SUMS[out])
        write(machine, _by_thread(product + _sums(before(machine))))

    return run


_SUMS = {"f32": np.float32, "f16": np.float32, "s32": np.int32}


def _read_sums(operands, place, kind):
    """A function of the machine that gives ``[numbers of a thread, threads]``."""
    in_register = "f16x2" if kind == "f16" else kind
    reads = [operands.read(text, in_register) for text in operands.vector(place)]

    def read_all(machine):
        numbers = [np.atleast_2d(read(machine)) for read in reads]
        return np.concatenate([np.broadcast_to(x, (len(x), machine.threads)) for x in numbers])

    return read_all


def _written_sums(operands, place, kind):
    """The way back."""
    in_register, count = ("f16x2", 2) if kind == "f16" else (kind, 1)
    writes = [operands.write(text, in_register) for text in operands.vector(place)]

    def write(machine, numbers):
        for i, write_one in enumerate(writes):
            write_one(machine, numbers[2 * i : 2 * i + 2] if count == 2 else numbers[i])

    return write


def _stacked(machine, reads):
    return np.stack([np.broadcast_to(read(machine), machine.threads) for read in reads])


# Products of four warps together, whose matrices lie in shared memory


WARPS = 4
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row that are mixed with those of other rows


@MAKERS.of("wgmma")
def _product_of_warps(operands):
    """``D = A B`` or ``D += A B``, 64 rows; it is complete at once."""
    if not operands.has("mma_async"):
        return _nothing(operands)
    out, of_left, of_right = operands.modifiers[-3:]
    columns = int(next(x for x in operands.modifiers if x.startswith("m64n")).split("k")[0][4:])
    if out not in _SUMS or operands.has("sp"):
        raise Unknown(f"a product that gives {out}")
    signs, transposed = _flags(operands.texts[4:])
    write, before = _written_sums(operands, 0, out), _read_sums(operands, 0, out)
    left = _left_of_warps(operands, of_left, transposed[0])
    of_b, adds = operands.read(2, "b64"), operands.read(3, "pred")

    def run(machine):
        b = _in_shared(machine, of_b(machine), columns, of_right, transposed[1])
        product = signs * np.matmul(left(machine), b.transpose(0, 2, 1))
        chunks = np.split(product.astype(_SUMS[out]).reshape(-1, 16, columns), columns // 8, axis=2)
        added = np.where(adds(machine), before(machine), _SUMS[out](0))
        write(machine, np.concatenate([_by_thread(chunk) for chunk in chunks]) + added)

    return run


def _flags(texts):
    """The product of the signs of both matrices, and whether each is transposed; a left one in registers never is."""
    flags = [int(text) for text in texts]
    signs, transposed = flags[:2], flags[2:]
    return int(np.prod(signs)), [0] * (2 - len(transposed)) + transposed


def _left_of_warps(operands, kind, is_transposed):
    """A function of the machine that gives ``[groups of warps, 64, K]``."""
    if operands.texts[1].startswith("{"):
        reads = [operands.read(text, "b32") for text in operands.vector(1)]
        return lambda machine: (x := _left(_stacked(machine, reads), kind)).reshape(-1, 64, x.shape[2])
    described = operands.read(1, "b64")
    return lambda machine: _in_shared(machine, described(machine), 64, kind, is_transposed)


def _in_shared(machine, descriptors, rows, kind, is_transposed):
    """Float32 ``[groups of warps, rows, K]`` of a matrix that a descriptor tells, zero for groups that take no part."""
    first = np.arange(0, machine.threads, WARPS * WARP)
    groups = np.arange(len(first)) if machine.mask is None else np.flatnonzero(machine.mask[first])
    descriptors = np.broadcast_to(descriptors, machine.threads)[first[groups]]
    size = size_of(kind)
    depth = 32 // size
    addresses = np.stack([_described(int(x), rows, depth, size, is_transposed) for x in descriptors])
    threads = np.repeat(first[groups], rows * depth)
    ((_, buffer, offsets),) = machine.spaces["shared"].places(machine, addresses.reshape(-1), threads, size)
    buffer.require_settled(machine, offsets, threads, size)
    numbers = decoded(kind)(buffer.numbers(size)[offsets // size]).astype(np.float32)
    out = np.zeros((len(first), rows, depth), np.float32)
    out[groups] = numbers.reshape(-1, rows, depth)
    return out


def _described(descriptor, rows, depth, size, is_transposed):
    """Addresses of all numbers, ``[rows, depth]``; rows or, where transposed, columns lie in 8 lines of a swizzle."""
    if descriptor >> 49 & 7:
        raise Unknown("a base offset of a matrix")
    begin, leading, stride = ((descriptor >> at & 0x3FFF) * 16 for at in (0, 16, 32))
    width = SWIZZLES[descriptor >> 62]
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if is_transposed:
        along, line = row * size, column
        if width == 16:
            leading, stride = stride, leading
        offsets = along % width + along // width * leading + line % 8 * width + line // 8 * stride
    else:
        along, line = column * size, row
        offsets = along + line % 8 * width + line // 8 * stride
        if width == 16:
            offsets += along // 16 * (leading - 16)
    addresses = begin + offsets
    return addresses ^ ((addresses >> 7) % (width // 16) << 4)
