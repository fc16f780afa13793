"""Checkpoints: written whole or not at all, found again, and refused when they belong to another run.

    {run_name}/checkpoint_{epoch}.pt              at each epoch's end (epochs count from 0), as the reference
    {run_name}/epoch_{epoch}_step_{update}.pt     every --save_steps updates within an epoch, the newest two

With --checkpoint_format sharded, folders of the same names without `.pt`: see sharded.py. Either is written while training goes on.

A checkpoint is a dict of the reference's `epoch` (the last finished one, -1 if none), `model_state_dict` (trained parameters under its
names), `optimizer_state_dict` and `lr_scheduler_state_dict`, and of what `resume.resume_state` adds.
"""

SHARDED_STATE = "state.pt"  # of a sharded checkpoint's folder, the file that holds all but the tensors
