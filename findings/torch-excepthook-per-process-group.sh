#!/bin/bash
# torch 2.13.0 (CPU), one process.
#
# Behaviour: init_process_group puts a hook of its own around sys.excepthook, which starts each line of a traceback with
# the rank, and destroy_process_group leaves it there. A process that makes and destroys n groups, one after the other,
# ends with n hooks: its lines have n such starts, and have them also where no group is left.
#
# Output seen:
#   0 groups: ValueError: the end
#   1 groups: [rank0]: ValueError: the end
#   3 groups: [rank0]: [rank0]: [rank0]: ValueError: the end
#
# Why it matters here: the points of a sweep run one after the other in one process, each with groups of its own, and the
# error of a late one comes under as many starts as there were points. Whoever makes groups repeatedly has to keep
# sys.excepthook and put it back.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" >/dev/null
cat >"$work/groups.py" <<'PYTHON'
import os
import sys

os.environ["GLOO_SOCKET_IFNAME"] = "lo"
import torch.distributed as dist

for _ in range(int(sys.argv[1])):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()
assert not dist.is_initialized()
raise ValueError("the end")
PYTHON
for groups in 0 1 3; do
    "$work/venv/bin/python" "$work/groups.py" "$groups" 2>"$work/errors" && exit 1
    said="$(tail -n 1 "$work/errors")"
    echo "$groups groups: $said"
    starts="$(printf '%*s' "$groups" '')"
    [[ "$said" == "${starts// /[rank0]: }ValueError: the end" ]] ||
        { echo "a traceback no longer has one start a group that was made" >&2; exit 1; }
done
