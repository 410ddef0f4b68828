from typing import Any, TypedDict

class BuildInfo(TypedDict):
    compiler: str
    flags: str
    instruction_sets: list[str]
    torch: str
    cuda: bool

class Choice(TypedDict):
    plans: dict[str, dict[str, Any]]
    refusals: dict[str, str]
    runs: str
    fastest: str
    why: str

def build_info() -> BuildInfo: ...
def cpu_features() -> dict[str, bool]: ...
def instruction_set() -> str: ...
def connect(
    tensor: type, parameter: type, kernel: int | None, rows: int, products: int
) -> None: ...
def small_step(
    cell: int,
    x: object,
    state: object,
    weights: tuple[object, ...] | dict[str, Any],
    names: tuple[str, ...] | list[Any] | None = None,
    /,
) -> Any: ...
def plan(
    *,
    device: dict[str, Any],
    cell: str,
    arithmetic: str,
    T: int,
    N: int,
    H: int,
    P: int,
    backward: bool,
    directions: int,
    layers: int,
    algorithm: str,
    proven_only: bool,
) -> Choice: ...
