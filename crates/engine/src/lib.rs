//! Where model, checkpoint and device meet: placement, forward runs, verification.
