//! Which tokens run next, in which KV blocks.
