"""``python -m tests.emulator --cell lstm --T 5 --N 3 --H 25``: one case of the CUDA ops.

Runs a random problem on the emulator, prints its largest error against float64 beside torch's own
at the same dtype, for every output (and gradient, with ``--backward``). Exit status 0 if all hold.
"""

import argparse
import functools
import sys
from pathlib import Path

# The tests' modules stand beside this folder, without a package around them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from layers import make_problem, oracle_layer, run, torch_layer
from numerics import assert_as_good_as

from emulator import build
from fused_rnn import autograd
from fused_rnn.cells import CELLS
from fused_rnn.plan import ALGORITHMS

DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="stepwise")
    parser.add_argument(
        "--team", type=int, choices=[1, 2, 4, 8, 16], default=2, help="blocks of a cluster, or SMs"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--T", type=int, default=5, help="steps (default: 5)")
    parser.add_argument("--N", type=int, default=3, help="batch (default: 3)")
    parser.add_argument("--H", type=int, default=25, help="hidden units (default: 25)")
    parser.add_argument("--P", type=int, default=0, help="projection, LSTM only (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the schedule")
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--backward", action="store_true", help="hold the gradients too")
    parser.add_argument("--control", action="store_true", help="clear, hold and cut at random")
    parser.add_argument("--rows", choices=["packed", "scattered"], default="")
    parser.add_argument("--h-mask", action="store_true", help="recurrent dropout")
    parser.add_argument("--keep", action="store_true", help="zoneout")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    torch.manual_seed(given.seed)
    problem = make_problem(
        given.cell,
        DTYPES[given.dtype],
        (given.T, given.N, given.H),
        P=given.P,
        reverse=given.reverse,
        control=given.control,
        rows=given.rows,
        h_mask=given.h_mask,
        keep=given.keep,
        product=True,
    )
    autograd.ops = build.ops()
    build.seed(given.seed)
    build.clusters(*(2**i == given.team for i in range(5)))
    build.sms(given.team)
    number = 1 + ALGORITHMS.index(given.algorithm)
    ours = run(functools.partial(autograd.layer, algorithm=number), problem)
    torchs = run(torch_layer, problem)
    oracle = run(oracle_layer, problem.to(torch.float64))
    scale = max(float(x.abs().max()) for x in problem.grads.values() if x.numel())
    print(f"{problem}, {given.dtype}, {given.algorithm}, seed {given.seed}")
    holds = True
    for name, expected in oracle.items():
        gradient = name.startswith("d")
        if (gradient and not given.backward) or not expected.numel():
            continue
        errors = [float((x.double() - expected).abs().max()) for x in (ours[name], torchs[name])]
        verdict = "ok"
        try:
            assert_as_good_as(
                ours[name],
                torchs[name],
                expected,
                name,
                length=problem.length,
                scale=scale if gradient else 1.0,
            )
        except AssertionError as error:
            holds, verdict = False, str(error)
        print(f"  {name:6} error {errors[0]:.2e}, torch's own {errors[1]:.2e}  {verdict}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
