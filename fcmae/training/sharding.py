"""Training with everything sharded (FSDP2): each device keeps its rows of parameters, gradients and AdamW's moments."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fcmae.checkpoints.format import read_checkpoint
from fcmae.checkpoints.sharded import Rows, finish, remove, replaced, write_rank
from fcmae.errors import TransientError, UserError
from fcmae.files import writing

T = TypeVar("T")


def all_devices(kind: str) -> DeviceMesh:
    """The devices of all ranks, with the process group whose time-out the run sets; Lightning's mesh has its own.

    Args:
        kind: `cuda` or `cpu`.
    """
    assert dist.group.WORLD is not None
    return DeviceMesh.from_group(dist.group.WORLD, kind)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each device its rows of a network's parameters; a block is gathered just before it is computed.

    What lies between the blocks (stem, downsampling, mask token, heads) is gathered for the whole of a step. Precision
    is autocast's, as with DDP, so that both compute the same. Names and the network's own code stay as they are.

    Args:
        network: an FCMAE or timm's ConvNeXt, with the same weights on every rank. Its `forward` is to be called, since
            that gathers the parameters.
        mesh: see `all_devices`.
    """
    if isinstance(network, FSDPModule):  # Lightning asks again before it validates
        return
    for parameter in network.parameters():  # channels-last ones are not taken
        parameter.data = parameter.data.contiguous()
    parts = [module for module in network.modules() if hasattr(module, "run_block")]  # of an autoencoder
    blocks = [module for module in network.modules() if isinstance(module, ConvNeXtBlock)]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for part in parts:
        _gather_to_run(part)


def _gather_to_run(part: Any) -> None:
    # The function that computes a packed image reads a block's parameters itself instead of calling the block. As a
    # method of the block it gathers them like `forward`, around what it recomputes and what is compiled in it.
    for block in part.modules():
        if isinstance(block, ConvNeXtBlock):
            block.run = MethodType(part.run_block, block)  # type: ignore[assignment]
            register_fsdp_forward_method(block, "run")
    part.run_block = _run


def _run(block: Any, *args: Any, **options: Any) -> Tensor:
    result: Tensor = block.run(*args, **options)
    return result


@contextlib.contextmanager
def gathered(network: nn.Module) -> Iterator[bool]:
    """Lets a part of a network be used by itself; says whether all ranks must take part, as they must if it is sharded.

    Calling the network gathers what lies between its blocks; calling a part of it does not.
    """
    if not isinstance(network, FSDPModule):
        yield False
        return
    network.unshard()
    try:
        yield True
    finally:
        network.reshard()


def whole(value: Tensor) -> Tensor:
    """A tensor with all its rows, on every rank; all of them must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_rows(network: nn.Module) -> list[Tensor]:
    """What this rank has of the parameters. A tensor of fewer rows than ranks leaves some ranks without any."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in network.parameters()]
    return [rows for rows in local if rows.numel()]


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, on the CPU; for the first rank, though all must ask for it, and others get less."""
    weights = {}
    for name, value in network.state_dict().items():
        gathered = whole(value)
        if not isinstance(value, DTensor) or value.device_mesh.get_rank() == 0:
            weights[name] = gathered.cpu()
    return weights


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all devices of all nodes, with checkpoints in which nothing is a pickle.

    A gradient is reduced after every micro-batch: those of an accumulation would else be kept whole. Checkpoints to go
    on from are folders, see `fcmae.checkpoints.sharded`; those of weights alone are files like any other's. Both kinds
    can be gone on from, on any number of devices. Nothing is written in the background: a rank writes its share of 12
    bytes per parameter, while a copy of it to write from would need as much memory again.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)

    def _configure_launcher(self) -> None:
        # The first that is asked of a strategy once it knows its devices.
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self._data_parallel_size == 1:
            raise UserError(
                "trainer=fsdp shards a model over several devices, and here is one: use trainer=gpu or trainer=cpu, or "
                "more of them with trainer.devices"
            )
        super()._configure_launcher()

    # A module and its optimiser give and take what they do on one device, with DTensors in it: so a checkpoint has the
    # same entries whatever the strategy.
    lightning_restore_optimizer = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return ParallelStrategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a folder, or, of weights without an optimiser, one file.

        Raises:
            UserError: a rank cannot write; earlier checkpoints are untouched.
        """
        path = Path(self.broadcast(filepath))
        if "optimizer_states" not in checkpoint:
            one = replaced(checkpoint, lambda name, value: whole(value).cpu() if isinstance(value, Tensor) else value)
            self._together(path, lambda: Strategy.save_checkpoint(self, one, path))
            return
        mine: dict[str, Tensor] = {}

        def shape_alone(name: str, value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            mine[name] = value.to_local().cpu().contiguous()
            return torch.empty(value.shape, dtype=value.dtype, device="meta")

        rest = replaced(checkpoint, shape_alone)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            self._together(path, lambda: remove(temporary) if self.is_global_zero else None)
            sizes = dict(self._together(path, lambda: write_rank(temporary, self.global_rank, mine)))
            self._together(path, lambda: finish(temporary, path, rest, sizes) if self.is_global_zero else None)
        except UserError:
            if self.is_global_zero:
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the space
            raise

    def _together(self, path: Path, work: Callable[[], T]) -> list[T]:
        """What every rank's part in writing `path` gives. An error of one is all ranks', or they would wait for it."""
        outcome: tuple[Any, str, bool] = None, "", False
        try:
            with writing(path):
                outcome = work(), "", False
        except UserError as error:
            outcome = None, str(error), isinstance(error, TransientError)
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, outcome)
        for _, told, may_pass in outcomes:
            if told:
                raise (TransientError if may_pass else UserError)(told)
        return [value for value, *_ in outcomes]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads this rank's rows of a folder's tensors, or of a file's.

        Raises:
            UserError: it cannot be read.
        """
        checkpoint = read_checkpoint(Path(self.broadcast(checkpoint_path)))
        assert self.lightning_module is not None
        weights = checkpoint["state_dict"]
        for name, like in self.lightning_module.state_dict().items():
            if name in weights:
                weights[name] = _rows_like(like, weights[name])
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, entry in state["state"].items():
                for name, value in entry.items():
                    if value.shape == parameters[index].shape:  # the moments; the number of steps is a scalar
                        entry[name] = _rows_like(parameters[index], value)
        return checkpoint


def _rows_like(like: Tensor, value: Tensor | Rows) -> Tensor:
    """Of a whole tensor, those rows that `like` has of its own."""
    if not isinstance(like, DTensor):
        return value[:] if isinstance(value, Rows) else value
    assert value.shape == like.shape, f"{tuple(value.shape)} is not {tuple(like.shape)}"
    mesh = like.device_mesh
    per_rank = -(-like.shape[0] // mesh.size())  # as torch.chunk deals them out
    start = min(mesh.get_local_rank() * per_rank, like.shape[0])
    rows = value[start : start + len(like.to_local())]
    local = rows.to(like.device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
