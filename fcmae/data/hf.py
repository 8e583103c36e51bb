"""Data sets of Hugging Face: memory-mapped from Arrow, or Parquet files that are read where they lie."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fcmae.data.hf_columns import choose_columns, encode_labels, stored_picture
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.parquet_shards import ParquetImages, read_schema
from fcmae.data.picture import Picture
from fcmae.data.sharded import Places, ShardedDataModule, ShardedSource
from fcmae.errors import TransientError, UserError, in_a_line

_PARQUET_BRANCH = "refs/convert/parquet"  # where the hub keeps a copy of every data set, a folder per configuration
_BUILDERS = ("arrow", "csv", "imagefolder", "json", "parquet")  # none of which unpickles anything
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves


class ArrowImages:
    """The images of data sets that lie in memory-mapped Arrow files; every split is a shard.

    Args:
        splits: `datasets.Dataset`s: the one to learn from and, if there is one, the one to validate with.
        image_column: see `choose_columns`.
        label_column: see `choose_columns`.
        in_chans: 1 for grey, 3 for RGB, any other number for what the files have.

    Raises:
        UserError: as `choose_columns` and `encode_labels`; splits of different columns.
    """

    def __init__(
        self, *, splits: Mapping[str, Any], image_column: str, label_column: str | None, in_chans: int
    ) -> None:
        self.in_chans = in_chans
        first, features = next((name, split.features) for name, split in splits.items())
        columns = choose_columns(features, image_column=image_column, label_column=label_column)
        for name, split in splits.items():
            for column in columns:
                if column is not None and split.features.get(column) != features[column]:
                    raise UserError(
                        f"data.val_split={name}: its column {column!r} is not that of {first} "
                        f"({split.features.get(column)}, not {features[column]}): choose splits that fit"
                    )
        self.shard_names = list(splits)
        self.shard_sizes = [len(split) for split in splits.values()]
        self._places = Places(self.shard_sizes)
        self._images = [_as_arrow(split, columns.image) for split in splits.values()]
        self.held_out: Sequence[int] | None = range(self.shard_sizes[0], len(self)) if len(splits) > 1 else None
        self.class_names: list[str] = []
        self.labels: Tensor | None = None
        if columns.label is not None:
            parts = [_as_arrow(split, columns.label)[:][columns.label] for split in splits.values()]
            self.class_names, self.labels = encode_labels(parts, features[columns.label], name=columns.label)

    def __len__(self) -> int:
        return len(self._places)

    def content(self) -> str:
        """Changes when the images do, although they are as many."""
        return repr([split._fingerprint for split in self._images])

    def fetcher(self) -> None:
        """All are on this machine."""

    def sample_id(self, index: int) -> str:
        """`<split>:<row>`."""
        split, row = self._places[index]
        return f"{self.shard_names[split]}:{row}"

    def open(self, index: int) -> Picture:
        """See `stored_picture`."""
        split, row = self._places[index]
        return stored_picture(self._images[split][row].column(0)[0].as_py(), in_chans=self.in_chans)


@dataclass(kw_only=True, eq=False)
class HFDataModule(ShardedDataModule):
    """Images of a Hugging Face data set, with labels or without.

    Args:
        path: name on the hub; or a folder, of images, of Parquet files or made by `save_to_disk`.
        name: of the configuration, if there are several.
        train_split: to learn from.
        val_split: to validate with; None to hold out a part of `train_split`.
        image_column: name of the column; `auto`: the only one of images.
        label_column: name of the column; `auto`: the only one of classes, else one named label or labels; None or
            `none`: no labels.
        revision: branch, tag or commit on the hub.
        streaming: whether Parquet files are read where they lie, a few row groups at a time; else the data set is
            fetched, and memory-mapped from Arrow files, where any order is as quick.
        cache_dir: folder for row groups of files on the hub; null for the user's cache folder.
    """

    path: str
    name: str | None
    train_split: str
    val_split: str | None
    image_column: str
    label_column: str | None
    revision: str | None
    streaming: bool

    def load_source(self) -> ShardedSource:
        try:
            import datasets  # noqa: F401
        except ImportError as error:
            raise UserError("data=hf needs the package datasets: pip install 'fcmae[hf]'") from error
        folder = Path(self.path).expanduser()
        if self.revision and folder.exists():
            raise UserError(f"data.revision={self.revision} is for names on the hub, data.path={self.path} is on disk")
        if any((folder / file).is_file() for file in _SAVED):
            return self._open_arrow(self._load_saved(folder))
        builder = self._find(folder)
        return self._open_parquet(builder) if self.streaming else self._open_arrow(self._prepare(builder))

    def hold_out(self, count: int, held_out: int) -> tuple[Sequence[int], Sequence[int]]:
        """The last ones if streaming; else any, because data sets are often sorted by class."""
        if self.streaming:
            return super().hold_out(count, held_out)
        return LabelledDataModule.hold_out(self, count, held_out)

    def _load_saved(self, folder: Path) -> dict[str, Any]:
        from datasets import DatasetDict, load_from_disk

        if self.streaming or self.name:
            wrong = "data.streaming=true" if self.streaming else f"data.name={self.name}"
            raise UserError(
                f"{wrong} is not for data.path={self.path}, which save_to_disk made: leave it out"
                + (", its files are memory-mapped and need no streaming" if self.streaming else "")
            )
        try:
            saved = load_from_disk(str(folder))
        except Exception as error:  # whatever is wrong with the files
            raise self._failed(error) from error
        if not isinstance(saved, DatasetDict):
            saved = {str(saved.split or "train").partition("[")[0]: saved}  # train[:10%] is a part of train
        return {name: saved[name] for name in self._splits(list(saved))}

    def _find(self, folder: Path) -> Any:
        """The `datasets.DatasetBuilder`, which knows the files and has fetched none."""
        from datasets import load_dataset_builder

        on_disk = folder.is_dir()
        if not on_disk:
            if folder.exists() or not _HUB_NAME.fullmatch(self.path):
                what = "is a file" if folder.exists() else "does not exist"
                raise UserError(f"data.path={self.path} {what}: name a folder, or a data set on the hub (owner/name)")
            _check_hub(self.path, self.revision)
        part = {"data_dir" if self.revision == _PARQUET_BRANCH else "name": self.name}
        try:
            builder = load_dataset_builder(str(folder) if on_disk else self.path, revision=self.revision, **part)
        except Exception as error:  # whatever is wrong with the files, or on the way to them
            raise self._failed(error) from error
        if builder.name not in _BUILDERS:
            raise UserError(
                f"data.path={self.path} holds files for {builder.name}, which are not read here: "
                f"use images or {', '.join(_BUILDERS)} files, or data=webdataset for tar files"
            )
        return builder

    def _prepare(self, builder: Any) -> dict[str, Any]:
        names = self._splits([str(name) for name in builder.config.data_files])
        try:
            builder.download_and_prepare()
            return {name: builder.as_dataset(split=name) for name in names}
        except Exception as error:  # whatever is wrong with the files, or on the way to them
            raise self._failed(error) from error

    def _open_arrow(self, splits: Mapping[str, Any]) -> ArrowImages:
        return ArrowImages(
            splits=splits,
            image_column=self.image_column,
            label_column=self.label_column,
            in_chans=self.in_chans,
        )

    def _open_parquet(self, builder: Any) -> ParquetImages:
        from datasets import Features

        if builder.name != "parquet":
            raise UserError(
                f"data.streaming=true reads Parquet files, data.path={self.path} holds others ({builder.name}): "
                f"set data.streaming=false, or for a name on the hub data.revision={_PARQUET_BRANCH}"
            )
        found = {str(name): list(urls) for name, urls in builder.config.data_files.items()}
        files = {name: found[name] for name in self._splits(list(found))}
        features = builder.info.features or Features.from_arrow_schema(read_schema(files[self.train_split][0]))
        columns = choose_columns(features, image_column=self.image_column, label_column=self.label_column)
        source = ParquetImages(
            files=files,
            features=features,
            columns=columns,
            kept=self.mixed_shards,
            cache=self.cache(),
            in_chans=self.in_chans,
        )
        if source.fetcher():
            self.cache().where()  # refused now if there is none, rather than in the midst of the run
        return source

    def _splits(self, found: Sequence[str]) -> list[str]:
        """The names of the splits asked for."""
        for option in ("train_split", "val_split"):
            name = getattr(self, option)
            if name not in found and (name is not None or option == "train_split"):
                raise UserError(f"data.{option}={name} is not one of {', '.join(found)}")
        if self.val_split == self.train_split:
            raise UserError(
                f"data.val_split={self.val_split} is data.train_split: leave it out, and a part of it is held out"
            )
        return [name for name in (self.train_split, self.val_split) if name is not None]

    def _failed(self, error: Exception) -> UserError:
        if isinstance(error, ConnectionError):
            return _unreachable(self.path, error)
        reason = " ".join(str(error).split())
        return UserError(
            f"data.path={self.path} cannot be loaded ({type(error).__name__}: {reason}): "
            "check the files, data.name and data.revision"
        )


def _as_arrow(split: Any, column: str) -> Any:
    """One column of a `datasets.Dataset`, nothing of it decoded."""
    return split.select_columns([column]).with_format("arrow")


def _check_hub(path: str, revision: str | None) -> None:
    """Asks the hub once; `datasets` would ask six times, for half a minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:  # what was fetched before will do
        return
    try:
        HfApi().dataset_info(path, revision=revision, timeout=10)
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", 0) >= 500:
            raise _unreachable(path, error) from error
        reason = in_a_line(error)
        raise UserError(
            f"data.path={path} is neither a folder nor a data set that the hub lets you read ({reason}): "
            "check the name and data.revision, or log in (hf auth login)"
        ) from error
    except Exception as error:  # of whatever library talks to it
        raise _unreachable(path, error) from error


def _unreachable(path: str, error: Exception) -> TransientError:
    from huggingface_hub import constants

    return TransientError(
        f"data.path={path} is no folder, and {constants.ENDPOINT} cannot be asked for it "
        f"({type(error).__name__}: {' '.join(str(error).split())}): without a network, run `hf download "
        f"--repo-type dataset {path} --local-dir DIR` where there is one, and set data.path=DIR"
    )
