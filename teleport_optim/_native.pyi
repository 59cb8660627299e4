from array import array

def step(
    params: list[int],
    averages: list[int],
    lags: list[int],
    grads: list[int],
    numbers: array[float],
    rate: float,
    decay: float,
    rest: float,
    keep: float,
    most_rows: int,
    units: memoryview,
    /,
) -> None: ...
def norms(tensors: list[int], sizes: array[int], /) -> list[float]: ...
def count(counts: list[int], /) -> None: ...
