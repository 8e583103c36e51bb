#!/usr/bin/env bash
# Does the wheel work away from the checkout? Build it, compare its configs with the tracked ones, install it into
# a clean environment and train two steps from another folder. Run by `make wheel-check`, or with .venv active.
set -euo pipefail
unset PYTHONPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python -m build --wheel --outdir "$work/dist" .
wheel=$(echo "$work"/dist/*.whl)

git ls-files configs >"$work/tracked"
python - "$wheel" "$work/tracked" <<'PY'
import sys
import zipfile
from pathlib import Path

archive = zipfile.ZipFile(sys.argv[1])
tracked = {name: Path(name).read_bytes() for name in Path(sys.argv[2]).read_text().splitlines()}
packed = {
    name.removeprefix("fcmae/"): archive.read(name)
    for name in archive.namelist()
    if name.startswith("fcmae/configs/") and not name.endswith("/")
}
differing = sorted(name for name in tracked.keys() | packed.keys() if tracked.get(name) != packed.get(name))
if differing or not tracked:
    sys.exit(f"fcmae/configs in the wheel and `git ls-files configs` differ: {differing or 'nothing is tracked'}")
print(f"{len(tracked)} config files in the wheel, all as tracked")
PY

# The clean environment borrows the installed dependencies (torch is gigabytes) through a .pth file. Folders named in
# a .pth are searched, but their own .pth files are not read: the editable install of the checkout stays invisible.
python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-deps "$wheel"
borrowed=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$borrowed" >"$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"

checkout=$PWD
mkdir "$work/elsewhere"
cd "$work/elsewhere"
"$work/venv/bin/python" - "$checkout" <<'PY'
import sys
from pathlib import Path

import fcmae

location, environment = Path(str(fcmae.__file__)).resolve(), Path(sys.prefix).resolve()
checkout = Path(sys.argv[1]).resolve()
assert environment in location.parents, f"fcmae comes from {location}, not from the wheel in {environment}"
assert checkout not in [Path(entry).resolve() for entry in sys.path], f"{checkout} is importable: {sys.path}"
PY

# Both ways in: the module and the console script.
for entry in "python -m fcmae.pretrain" "fcmae pretrain"; do
    rm -rf outputs
    echo "\$ $entry"
    # shellcheck disable=SC2086  # the words of the command
    PATH="$work/venv/bin:$PATH" $entry \
        +model=atto trainer=cpu trainer.max_steps=2 data.num_workers=0 run_name=wheel </dev/null
    if [[ ! -s outputs/pretrain/wheel/checkpoints/last.ckpt ]]; then
        echo "$entry wrote no outputs/pretrain/wheel/checkpoints/last.ckpt" >&2
        exit 1
    fi
done
echo "wheel check passed: $(basename "$wheel")"
