//! The embedding, plainly.

/// Rows `ids` of a table of width `d`.
pub fn embedding(table: &[f32], d: usize, ids: &[u32]) -> Vec<f32> {
    ids.iter().flat_map(|&id| table[id as usize * d..][..d].to_vec()).collect()
}
