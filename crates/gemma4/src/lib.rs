//! The Gemma 4 E2B/E4B text model: architecture, parameters, forward pass, FLOPs.
