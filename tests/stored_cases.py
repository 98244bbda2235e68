"""How files go wrong: changed in every way we could think of, and cut off by a killed process."""

import json
import os
import signal
import time


def mutated(content, generator):
    """The content of a file, changed somewhere."""
    while True:
        changed = generator.choice(_MUTATIONS)(bytearray(content), generator)
        if changed != content:
            return bytes(changed)


def save_until_killed(caches, path, seconds):
    """A process saves one cache after the other to one path, until it is killed; a first one comes through."""
    child = os.fork()
    if not child:
        try:
            while True:
                for cache in caches:
                    cache.save(path)
        finally:
            os._exit(1)
    while not path.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it could not save"
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _cut(content, generator):
    return content[: generator.randrange(len(content))]


def _longer(content, generator):
    return content + generator.randbytes(generator.randrange(1, 200))


def _bit(content, generator):
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return content


def _bit_of_header(content, generator):
    content[generator.randrange(8 + _header_length(content))] ^= 1 << generator.randrange(8)
    return content


def _byte(content, generator):
    content[generator.randrange(len(content))] = generator.randrange(256)
    return content


def _zeros(content, generator):
    first = generator.randrange(len(content))
    stop = min(len(content), first + generator.randrange(1, 5000))
    content[first:stop] = bytes(stop - first)
    return content


def _bytes_missing(content, generator):
    first = generator.randrange(len(content))
    del content[first : first + generator.randrange(1, 200)]
    return content


def _bytes_swapped(content, generator):
    size = generator.randrange(1, 2000)
    first, second = sorted(generator.randrange(len(content) - size) for _ in range(2))
    content[first : first + size], content[second : second + size] = (
        content[second : second + size],
        content[first : first + size],
    )
    return content


def _tensors_swapped(content, generator):
    """Two tensors of one size change places."""
    entries = list(_entries(content).values())
    first = generator.choice(entries)
    (a, b), others = first["data_offsets"], [one for one in entries if _size(one) == _size(first) and one is not first]
    if others:
        c, d = generator.choice(others)["data_offsets"]
        start = 8 + _header_length(content)
        content[start + a : start + b], content[start + c : start + d] = (
            content[start + c : start + d],
            content[start + a : start + b],
        )
    return content


def _names_swapped(content, generator):
    first, second = generator.sample(sorted(_entries(content)), 2)
    return _renamed(content, {first: second, second: first})


def _renamed(content, names):
    length = _header_length(content)
    head = json.loads(content[8 : 8 + length])
    head = {names.get(name, name): entry for name, entry in head.items()}
    return _with_header(content, head)


def _other_metadata(content, generator):
    """Another model, another preset, another number of tokens, another format or version of it."""
    head = json.loads(content[8 : 8 + _header_length(content)])
    metadata = head["__metadata__"]
    header = json.loads(metadata["header"])
    name = generator.choice([*header, "format", "version"])
    if name == "format":
        metadata["format"] = f"qjl-prompt-cache-{generator.randrange(100)}"
    elif name == "version":
        metadata["version"] = str(generator.randrange(4, 100))
    else:
        header[name] = generator.choice([None, "", generator.randrange(1000), generator.randbytes(4).hex(), [], {}])
        metadata["header"] = json.dumps(header)
    return _with_header(content, head)


def _other_shape(content, generator):
    head = json.loads(content[8 : 8 + _header_length(content)])
    entry = head[generator.choice(sorted(_entries(content)))]
    key = generator.choice(["dtype", "shape", "data_offsets"])
    entry[key] = generator.choice([None, [], [generator.randrange(1 << 40)] * 2, "F32", "U8", [-1, -1]])
    return _with_header(content, head)


def _with_header(content, head):
    data = content[8 + _header_length(content) :]
    text = json.dumps(head, separators=(",", ":")).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def _header_length(content):
    return int.from_bytes(content[:8], "little")


def _entries(content):
    head = json.loads(content[8 : 8 + _header_length(content)])
    return {name: entry for name, entry in head.items() if name != "__metadata__"}


def _size(entry):
    first, stop = entry["data_offsets"]
    return stop - first


_MUTATIONS = (
    _cut,
    _longer,
    _bit,
    _bit_of_header,
    _byte,
    _zeros,
    _bytes_missing,
    _bytes_swapped,
    _tensors_swapped,
    _names_swapped,
    _other_metadata,
    _other_shape,
)
