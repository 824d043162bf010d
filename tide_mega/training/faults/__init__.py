"""Faults during training and how a run reacts: skip, roll back, name stragglers, stop, or exit to be restarted.

A step that is not finite on some rank, or whose loss leaps: `policy.take_vote` collects what each rank saw,
`FaultPolicy.judge` decides, alike on all ranks, `guard.StepGuard` has the engine step or skip, and
`tide_mega.training.trainer.Reactions` logs an event and rolls back if need be. The counts are saved with the next
checkpoint; nothing is saved at once.
"""
