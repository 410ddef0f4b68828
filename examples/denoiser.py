"""Take the noise out of speech as it comes in, ten milliseconds at a time.

A network of the size of DeepFilterNet's core (three GRU layers of 256) hears the energies of 32
frequency bands and says how much of each band is speech. It learns on whole sequences. In use
sound comes in hops of 160 samples, and an answer is wanted before the next one is there: ``step``
runs all layers for one hop, and the state that it returns is all that has to be kept.

The program trains, then streams sound that it has not heard, hop by hop, and reports how much
better it has become, how much of a hop's ten milliseconds was needed (the real-time factor), and
how far the streamed sound is from what one call over the whole gives. Speech is made up, of
harmonics of a gliding pitch under moving formants, in syllables; noise is coloured at random.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import wave
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, pad

import fused_rnn

RATE, HOP = 16_000, 160
FRAME = 2 * HOP
BANDS, HARMONICS, SYLLABLE = 32, 24, RATE // 5


class Denoiser(nn.Module):
    def __init__(self, namespace: ModuleType, hidden: int, layers: int):
        super().__init__()
        self.gru = namespace.GRU(BANDS, hidden, layers)
        self.head = nn.Linear(hidden, BANDS)
        # Analysis and synthesis both weigh with it: its squares, a hop apart, add up to 1.
        self.register_buffer("window", torch.hann_window(FRAME).sqrt())
        self.register_buffer("bands", triangles())

    def spectrum(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames ``[*, FRAME]`` to their spectra and the logarithms of their bands' energies."""
        spectrum = torch.fft.rfft(frames * self.window)
        return spectrum, torch.log10(spectrum.abs().square() @ self.bands + 1e-4)

    def frames(self, spectrum: Tensor, h: Tensor) -> Tensor:
        """Frames ``[*, FRAME]`` with the gains that ``h`` stands for, weighed for overlap-add."""
        gain = self.head(h).sigmoid() @ self.bands.T
        return torch.fft.irfft(spectrum * gain, FRAME) * self.window

    def forward(self, sound: Tensor) -> Tensor:
        """Sound ``[samples, N]``, of whole hops, without its noise and a hop late."""
        frames = pad(sound.T, (HOP, 0)).unfold(1, FRAME, HOP).transpose(0, 1)  # [T, N, FRAME]
        spectrum, energies = self.spectrum(frames)
        h, _ = self.gru(energies)
        frames = self.frames(spectrum, h)
        late = pad(frames[:-1, :, HOP:], (0, 0, 0, 0, 1, 0))
        return (frames[:, :, :HOP] + late).transpose(1, 2).flatten(0, 1)


class Stream:
    """The same, a hop a call."""

    def __init__(self, model: Denoiser, batch: int = 1):
        self.model, self.state = model, None
        self.heard = model.window.new_zeros(batch, HOP)
        self.late = model.window.new_zeros(batch, HOP)

    def push(self, hop: Tensor) -> Tensor:
        """A hop of sound in, the hop before it out without its noise: ``[N, HOP]``."""
        spectrum, energies = self.model.spectrum(torch.cat([self.heard, hop], dim=1))
        gru = self.model.gru
        if isinstance(gru, nn.GRU):  # it has no step
            h, self.state = gru(energies.unsqueeze(0), self.state)
            h = h.squeeze(0)
        else:
            h, self.state = gru.step(energies, self.state)
        frame = self.model.frames(spectrum, h)
        answer = frame[:, :HOP] + self.late
        self.heard, self.late = hop, frame[:, HOP:]
        return answer


def triangles() -> Tensor:
    """Which bins a band consists of, ``[bins, BANDS]``: ever wider triangles, which add up to 1."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)  # the mel scale
    mel = torch.linspace(0, top, BANDS)
    centre = 700 * (10 ** (mel / 2595) - 1) / RATE * FRAME  # in bins
    bins = torch.arange(HOP + 1).unsqueeze(1)
    at = torch.bucketize(bins.float().squeeze(1), centre[1:-1])
    up = ((bins.squeeze(1) - centre[at]) / (centre[at + 1] - centre[at])).clamp(0, 1)
    found = torch.zeros(HOP + 1, BANDS)
    found.scatter_(1, at.unsqueeze(1), (1 - up).unsqueeze(1))
    return found.scatter_(1, at.unsqueeze(1) + 1, up.unsqueeze(1))


def speech(samples: int, count: int, generator: torch.Generator) -> Tensor:
    """Made-up speech, ``[samples, count]``."""
    syllables = samples // SYLLABLE + 2

    def moving(low: float, high: float) -> Tensor:
        """A value for each syllable, and between them a straight line: ``[count, samples]``."""
        value = low + (high - low) * torch.rand(count, 1, syllables, generator=generator)
        return interpolate(value, syllables * SYLLABLE, mode="linear").squeeze(1)[:, :samples]

    pitch = moving(90, 250)
    phase = (2 * math.pi / RATE * pitch).cumsum(1)
    formants = [(moving(300, 900), 100), (moving(900, 2500), 200), (moving(2500, 3500), 300)]
    voice = torch.zeros(count, samples)
    for harmonic in range(1, HARMONICS + 1):
        for formant, width in formants:
            loudness = 1 / (1 + ((harmonic * pitch - formant) / width).square())
            voice += loudness * torch.sin(harmonic * phase)
    return (voice * moving(-1, 1).clamp(min=0.01)).T  # half of the time next to nothing is said


def noise(samples: int, count: int, generator: torch.Generator) -> Tensor:
    """White noise that is made duller by an amount of its own, ``[samples, count]``."""
    spectrum = torch.fft.rfft(torch.randn(samples, count, generator=generator), dim=0)
    frequency = torch.linspace(0.01, 1, len(spectrum)).unsqueeze(1)
    dullness = torch.rand(count, generator=generator)
    return torch.fft.irfft(spectrum * frequency**-dullness, samples, dim=0)


def recordings(samples: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy and clean sound, ``[samples, count]``; noise 0 to 10 dB below speech."""
    clean = speech(samples, count, generator)
    clean = 0.1 * clean / clean.square().mean(0).sqrt()
    hiss = noise(samples, count, generator)
    below = 10 * torch.rand(count, generator=generator)
    hiss = 0.1 * hiss / hiss.square().mean(0).sqrt() * 10 ** (-below / 20)
    return clean + hiss, clean


def train(model: Denoiser, steps: int, batch: int, generator: torch.Generator) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        noisy, clean = recordings(RATE, batch, generator)
        loss = mse_loss(model(noisy)[HOP:], clean[:-HOP]) / clean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def stream(model: Denoiser, sound: Tensor) -> tuple[Tensor, list[float]]:
    """Sound ``[samples]`` hop by hop: what comes out, and the seconds that each hop took."""
    line, out, seconds = Stream(model), [], []
    for hop in sound.view(-1, 1, HOP):
        start = time.perf_counter()
        out.append(line.push(hop))
        seconds.append(time.perf_counter() - start)
    return torch.cat(out, dim=1).squeeze(0), seconds


def decibels(clean: Tensor, other: Tensor) -> float:
    """How far below speech what is not speech lies."""
    return 10 * torch.log10(clean.square().sum() / (other - clean).square().sum()).item()


def write(path: Path, sound: Tensor) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound.clamp(-1, 1) * 32767).short().numpy().tobytes())


class Result(NamedTuple):
    losses: list[float]  # energy of what is wrong over that of speech
    before: float  # dB
    after: float
    seconds: list[float]  # of each hop
    difference: float  # streamed and at once, in float64, largest, relative
    sounds: list[Path]


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="recordings of a second each")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10, help="of sound to stream")
    parser.add_argument("--out", type=Path, default=Path("sounds"), help="folder of the sounds")
    parser.add_argument("--torch", action="store_true", help="use torch.nn.GRU")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Denoiser(nn if args.torch else fused_rnn, args.hidden, args.layers)
    losses = train(model, args.steps, args.batch, generator)
    noisy, clean = (sound.squeeze(1) for sound in recordings(args.seconds * RATE, 1, generator))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a hop a second one is not worth its wakening
    denoised, seconds = stream(model, noisy)
    exact = copy.deepcopy(model).double()
    streamed, _ = stream(exact, noisy[:RATE].double())
    with torch.inference_mode():
        at_once = exact(noisy[:RATE].double().unsqueeze(1)).squeeze(1)
    torch.set_num_threads(threads)

    args.out.mkdir(parents=True, exist_ok=True)
    sounds = {"clean": clean[:-HOP], "noisy": noisy[:-HOP], "denoised": denoised[HOP:]}
    for name, sound in sounds.items():
        write(args.out / f"{name}.wav", sound)
    result = Result(
        losses,
        decibels(sounds["clean"], sounds["noisy"]),
        decibels(sounds["clean"], sounds["denoised"]),
        seconds,
        ((streamed - at_once).abs().max() / at_once.abs().max()).item(),
        [args.out / f"{name}.wav" for name in sounds],
    )
    print(f"{args.layers} GRU layers of {args.hidden}: {len(losses)} steps of training")
    print(f"  error / speech       {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"{args.seconds} s of unheard sound, a hop of 10 ms at a time")
    print(f"  speech over noise    {result.before:.1f} dB -> {result.after:.1f} dB")
    print(f"  a hop, median        {statistics.median(seconds) * 1e3:.3f} ms")
    print(f"  real-time factor     {sum(seconds) / args.seconds:.3f}")
    print(f"  streamed - at once   {result.difference:.1e}")
    print("sounds: " + " ".join(map(str, result.sounds)))
    return result


if __name__ == "__main__":
    main()
