"""Random batches and oracles: the papers' formulas as loops over samples."""

import torch
from torch import Tensor

from geomreg import Embeddings

NO_MEAN = torch.zeros(())


def random_pair(rows: int = 5, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Embeddings, Embeddings]:
    """Student (leaves with grad) and teacher embeddings of the same random image-text pairs."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    return Embeddings(values[0].requires_grad_(), values[1].requires_grad_()), Embeddings(*values[2:])


def random_vector(width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random vector, to stand for the mean or a shift."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed + 1_000_003), dtype=torch.float64).to(dtype)


def rotation(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed + 2_000_003)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


def mapped(embeddings: Embeddings, function) -> Embeddings:
    """``function`` of each modality that is there, as fresh leaves where the embeddings were leaves."""
    return Embeddings(*(None if value is None else function(value.detach()).requires_grad_(value.requires_grad) for value in embeddings))


def gradients(value: Tensor, student: Embeddings) -> list[Tensor]:
    """Gradient of ``value`` with respect to each modality that is there."""
    return list(torch.autograd.grad(value, [one for one in student if one is not None]))


def shifts(student: Embeddings, teacher: Embeddings) -> list[Tensor]:
    """Difference vectors in float64, modality by modality."""
    return [
        one.detach().double() - other.double() for one, other in zip(student, teacher, strict=True) if one is not None and other is not None
    ]


def square(vector: Tensor) -> float:
    """Squared Euclidean norm, one coordinate after the other."""
    return sum(float(coordinate) ** 2 for coordinate in vector.tolist())


def average_vector_oracle(student: Embeddings, teacher: Embeddings, mean: Tensor) -> float:
    """(1/B) sum_j |u_j - m|^2, added over modalities."""
    return sum(sum(square(row - mean.double()) for row in shift) / len(shift) for shift in shifts(student, teacher))


def pairwise_vector_oracle(student: Embeddings, teacher: Embeddings, mean: Tensor = NO_MEAN) -> float:
    """(1/B) sum_j |u_j - v_j|^2."""
    images, texts = shifts(student, teacher)
    return sum(square(image - text) for image, text in zip(images, texts, strict=True)) / len(images)


def dive_oracle(student: Embeddings, teacher: Embeddings, mean: Tensor) -> float:
    """Both."""
    return average_vector_oracle(student, teacher, mean) + pairwise_vector_oracle(student, teacher)


def batch_mean(student: Embeddings, teacher: Embeddings) -> Tensor:
    """Mean of all difference vectors of both modalities."""
    return torch.cat(shifts(student, teacher)).mean(dim=0)
