"""Dry runs: any rank of any job on one machine without GPUs, running the real program on tensors without memory.

`cuda.install` answers for `torch.cuda`, `groups` for the other ranks, and `mode.dry_run` runs its body on fake
tensors, while a `Recorder` notes what the device, the network and the host are asked to do. Floats have no
values; integers and booleans do, so that everything whose size depends on data has its true size.

It changes torch permanently, so it belongs in a process of its own, which `worker.DryWorker` starts. Nothing in
the training run imports this package.
"""
