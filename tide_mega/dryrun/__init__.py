"""Any rank of any job on one machine without its GPUs: the real program on tensors that have no memory.

`cuda.install` answers for `torch.cuda`, `groups` for the other ranks, and `mode.dry_run` runs what is inside it on
fake tensors, while a `Recorder` notes what the device, the network and the host were asked to do. Floats have no
values; integers and booleans do, so that everything whose size depends on the data has its true size.

It changes torch for good, so it belongs in a process of its own: `worker.DryWorker` starts one. Nothing of the
training run imports this package.
"""
