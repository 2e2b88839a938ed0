//! The choice of rows, plainly.

/// Rows `rows` of a matrix of width `d`.
pub fn gather_rows(x: &[f32], d: usize, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|&row| x[row * d..][..d].to_vec()).collect()
}
