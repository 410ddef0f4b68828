from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    flags: str
    instruction_sets: list[str]
    torch: str
    cuda: bool

def build_info() -> BuildInfo: ...
def cpu_features() -> dict[str, bool]: ...
def instruction_set() -> str: ...
