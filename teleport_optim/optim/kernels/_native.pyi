from array import array

def step(
    params: list[int],
    averages: list[int],
    offsets: list[int] | None,
    grads: list[int],
    numbers: array[float],
    rate: float,
    decay: float,
    gradient_weight: float,
    keeps: array[float],
    prints: array[int],
    most_rows: int,
    blocks: memoryview,
    /,
) -> None: ...
def norms(tensors: list[int], sizes: array[int], /) -> list[float]: ...
def count(counts: list[int], ends: list[int], /) -> None: ...
def compare(fingerprints: list[int], prints: array[int], /) -> list[int]: ...
def fingerprints(tensors: list[int], shapes: array[int], prints: array[int], /) -> None: ...
