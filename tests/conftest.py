"""What several test files share."""

from collections.abc import Callable

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from fcmae.masking import Mask

# A busy machine is slow; that is no failure.
hypothesis.settings.register_profile("fcmae", deadline=None)
hypothesis.settings.load_profile("fcmae")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The jobs on SLURM begin: they mostly wait, and at the end other cores would have nothing to do meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_slurm.py")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors here are small; more threads gain little and, on busy machines, wait for each other for long."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Gives every parameter a value that matters; fresh ones of GRN and biases are zero and would hide errors."""

    @torch.no_grad()
    def fill(module: nn.Module) -> nn.Module:
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
            if name.endswith(("norm.weight", "stem.1.weight", "downsample.0.weight")):
                parameter += 1
        return module

    return fill


@pytest.fixture(scope="session")
def draw_mask() -> Callable[..., Mask]:
    """A random mask of which exactly so many patches are seen."""

    def draw(batch: int, h: int, w: int, seen: int) -> Mask:
        chosen: Tensor = torch.rand(batch, h * w).argsort(1) < seen  # argsort of noise is a random permutation
        return Mask(chosen.view(batch, h, w))

    return draw
