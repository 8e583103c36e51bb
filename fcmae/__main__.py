"""The console script: `fcmae <verb> ...` is `python -m fcmae.<verb> ...`."""

import difflib
import runpy
import sys
from pathlib import Path

VERBS = {
    "pretrain": "pre-train a ConvNeXt V2 on your images",
    "finetune": "fine-tune it for classification, or train its last layer",
    "evaluate": "say how good a classifier, or a frozen encoder, is",
    "predict": "write the classes of images to a table",
    "embed": "write the features of images to a table",
    "export": "write a trained network for timm, transformers, ONNX ..., and prove it",
    "consolidate": "make one file of a sharded checkpoint",
    "shard": "pack images into shards, to read them fast and from afar",
    "bench": "time training steps against the masked dense network",
}


def main() -> None:
    """Runs the module of the verb, as Python's -m would."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        _help()
        return
    verb = arguments[0]
    if verb == "--version":
        import fcmae

        print(f"fcmae {fcmae.__version__}")  # noqa: T201
        return
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        sys.exit(_refuse(f"{verb!r} is not one of {', '.join(VERBS)}{hint}"))
    sys.argv = [f"fcmae {verb}", *arguments[1:]]
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # Python 3.10 does not know safe_path
        sys.path.insert(0, str(Path.cwd()))  # where -m finds classes of one's own
    runpy.run_module(f"fcmae.{verb}", run_name="__main__", alter_sys=True)


def _help() -> None:
    lines = [f"  {verb:<11} {what}" for verb, what in VERBS.items()]
    print("\n".join(["usage: fcmae VERB [key=value ...]", "", *lines, "", "fcmae VERB --help tells a verb's options."]))  # noqa: T201


def _refuse(message: str) -> int:
    print(f"fcmae: {message}", file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    main()
