//! Symbolic programs: builder with shape inference, StableHLO printer, reference interpreter.
