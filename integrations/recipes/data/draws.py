"""Random batches that are the same whatever the number of processes and workers, from any step on."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from geomreg.checks import check_count
from geomreg.integrations.recipes.data.collate import collate

__all__ = ["Drawn", "Draws", "loader"]

WINDOW = 8  # groups whose samples are mixed
TRIES = 100  # neighbours that are tried in place of a broken sample


class Draws(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, row): every row at most once an epoch, in an order that depends on seed and epoch alone.

    All processes together draw ``ranks * batch_size`` rows a batch, of which each takes every ``ranks``-th; what is left of an epoch
    when it is too little for a batch is left out. A run that goes on begins with the batch whose number it has reached.

    Args:
        rows: N of the data set.
        batch_size: of one process.
        seed: of the orders.
        rank: of this process.
        ranks: number of processes.
        start: number of the first batch.
        groups: ``(N,)`` group of each row, a tar file say, ascending: groups are shuffled, and rows only within windows of a few
            groups, so that files are read one after the other.

    Raises:
        ValueError: fewer rows than a batch of all processes.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        start: int = 0,
        groups: NDArray[Any] | None = None,
    ) -> None:
        for option, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("start", start, 0)):
            check_count("Draws", option, value, least)
        if rows < ranks * batch_size:
            raise ValueError(
                f"Draws: expected at least {ranks * batch_size} samples for a batch of {batch_size} in {ranks} processes, got {rows}. "
                "Lower the batch size."
            )
        self.rows, self.batch_size, self.seed, self.rank, self.ranks, self.start = rows, batch_size, seed, rank, ranks, start
        self.groups = groups
        self.batches_an_epoch = rows // (ranks * batch_size)

    def order(self, epoch: int) -> Tensor:
        """The rows in the order of an epoch."""
        generator = torch.Generator().manual_seed(_seed(self.seed, epoch))
        if self.groups is None:
            return torch.randperm(self.rows, generator=generator)
        names, starts = np.unique(self.groups, return_index=True)
        parts = np.split(np.arange(self.rows), starts[1:])
        shuffled = [parts[k] for k in torch.randperm(len(names), generator=generator)]
        windows = [np.concatenate(shuffled[k : k + WINDOW]) for k in range(0, len(shuffled), WINDOW)]
        return torch.cat([torch.from_numpy(one)[torch.randperm(len(one), generator=generator)] for one in windows])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batch = divmod(self.start, self.batches_an_epoch)
        size = self.ranks * self.batch_size
        while True:
            order = self.order(epoch)
            for k in range(batch, self.batches_an_epoch):
                yield [(epoch, row) for row in order[k * size : (k + 1) * size][self.rank :: self.ranks].tolist()]
            epoch, batch = epoch + 1, 0


class Drawn(Dataset[dict[str, Any]]):
    """Samples by (epoch, row), with random numbers for augmentation that depend on seed, epoch and row alone.

    A broken sample is replaced by the next row that is whole, and its message is the sample's ``"replaced"``, which is None otherwise.

    Args:
        dataset: map-style; its samples are dicts.
        seed: of the augmentation.
        texts: ``(T, C, L)`` token ids of C classes in T templates: the text of a labelled sample is then a random one of its class.
    """

    def __init__(self, dataset: Any, *, seed: int, texts: Tensor | None = None) -> None:
        self.dataset, self.seed, self.texts = dataset, seed, texts

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        epoch, row = draw
        replaced: str | None = None
        for k in range(TRIES):
            state = torch.get_rng_state()
            torch.default_generator.manual_seed(_seed(self.seed, epoch, row))  # torch.manual_seed would reseed the GPUs too
            try:
                sample = self.dataset[(row + k) % len(self.dataset)]
                template = 0 if self.texts is None else int(torch.randint(len(self.texts), ()))
            finally:
                torch.set_rng_state(state)
            if "broken" not in sample:
                if self.texts is not None:
                    sample = {**sample, "text": self.texts[template, sample["label"]]}
                return {**sample, "replaced": replaced}
            replaced = replaced or sample["broken"]
        raise ValueError(f"Drawn: expected samples that can be read, got {TRIES} broken ones in a row, the first {replaced}. Look at them.")


def loader(dataset: Drawn, draws: Draws, *, workers: int = 0) -> Iterator[dict[str, Any]]:
    """Endless collated batches; ``"broken"`` lists the messages of the drawn samples that were replaced."""
    check_count("loader", "workers", workers, 0)
    return iter(
        DataLoader(
            _Batches(dataset),
            batch_size=None,  # they are batches already
            sampler=draws,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that making a loader moves no one else's random numbers
        )
    )


class _Batches(Dataset[dict[str, Any]]):
    """Batches by their draws."""

    def __init__(self, dataset: Drawn) -> None:
        self.dataset = dataset

    def __getitem__(self, draws: list[tuple[int, int]]) -> dict[str, Any]:
        broken: list[str] = []

        def samples() -> Iterator[dict[str, Any]]:
            for draw in draws:
                sample = self.dataset[draw]
                if (message := sample.pop("replaced")) is not None:
                    broken.append(message)
                yield sample

        return collate(samples(), len(draws)) | {"broken": broken}


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
