//! From a checkpoint's rows to tiles, a panel of [`TILE_N`] rows a task.

use std::ops::Range;

use moesaic_device::{Isa, Pool};
use moesaic_spec::DType;

use super::{Layout, OP, PackedMatrix, SCALE_K, SourceMatrix, TILE_K, TILE_N, fp8};
use crate::KernelError;
use crate::contract::require;

/// Where rows go: row `r` of the source becomes virtual row `v = first + r`, which is lane `v % 16` of panel
/// `v / 16 * panel_step + panel_offset`.
#[derive(Clone, Copy)]
pub(crate) struct Placement {
    pub(crate) first: usize,
    pub(crate) panel_step: usize,
    pub(crate) panel_offset: usize,
}

impl PackedMatrix {
    /// Packs all rows of `src` as rows `dst_row..` of this matrix, converting its elements: to F32 and BF16 from all four
    /// source types (rounded to nearest even, scales applied); to F8 E4M3 only from F8 E4M3, whose scales are kept, so
    /// their blocks must be 128 columns wide. Other rows stay as they are.
    pub fn pack_rows(&mut self, pool: &Pool, dst_row: usize, src: &SourceMatrix) -> Result<(), KernelError> {
        let placement = Placement { first: dst_row, panel_step: 1, panel_offset: 0 };
        let fits = dst_row.checked_add(src.rows).is_some_and(|end| end <= self.n());
        let got = || format!("{dst_row}..{dst_row}+{}", src.rows);
        require(fits, OP, "packed rows", || format!("within 0..{}", self.n()), got)?;
        self.pack_placed(pool, placement, src, 0..src.rows)
    }

    /// Packs some rows of `src`, the first of them as virtual row `placement.first`.
    pub(crate) fn pack_placed(
        &mut self,
        pool: &Pool,
        placement: Placement,
        src: &SourceMatrix,
        rows: Range<usize>,
    ) -> Result<(), KernelError> {
        src.check()?;
        require(src.cols == self.k(), OP, "source columns", || self.k().to_string(), || src.cols.to_string())?;
        require(rows.end <= src.rows, OP, "source rows", || src.rows.to_string(), || format!("{rows:?}"))?;
        if self.dtype() == DType::F8E4M3 {
            let ok = src.dtype == DType::F8E4M3;
            require(ok, OP, "source of an F8_E4M3 matrix", || "F8_E4M3".into(), || src.dtype.to_string())?;
            let width = src.scales.map_or(SCALE_K, |s| s.block[1]);
            require(width == SCALE_K, OP, "scale block's columns", || SCALE_K.to_string(), || width.to_string())?;
        }
        if self.is_meta() || rows.is_empty() {
            return Ok(());
        }
        let (dtype, panels) = (self.dtype(), self.panels());
        let layout = Layout::new(self.k(), dtype);
        let Placement { first, panel_step, panel_offset } = placement;
        let (begin, end) = (first / TILE_N, (first + rows.len()).div_ceil(TILE_N));
        assert!((end - 1) * panel_step + panel_offset < panels);
        let base = Base(self.bytes_mut().as_mut_ptr());
        let avx512 = Isa::detect() >= Isa::Avx512;
        pool.run(end - begin, &|task| {
            let group = begin + task.idx;
            let panel = group * panel_step + panel_offset;
            let lanes = first.max(group * TILE_N)..(first + rows.len()).min((group + 1) * TILE_N);
            let job = PanelJob {
                src,
                src_row: rows.start + lanes.start - first,
                lanes: lanes.start - group * TILE_N..lanes.end - group * TILE_N,
            };
            let (tiles_at, scale_bytes) = (panel * layout.panel_bytes, layout.scales * TILE_N * size_of::<f32>());
            let scales_at = panels * layout.panel_bytes + panel * scale_bytes;
            // SAFETY: both ranges lie in the matrix's region (assertion above, `packed_bytes`); each task has a panel of its
            // own, tiles and scales do not overlap, and the matrix is borrowed mutably for as long as the pool runs.
            let (tiles, scales) = unsafe {
                let tiles = std::slice::from_raw_parts_mut(base.get().add(tiles_at), layout.panel_bytes);
                (tiles, std::slice::from_raw_parts_mut(base.get().add(scales_at), scale_bytes))
            };
            #[cfg(target_arch = "x86_64")]
            if avx512 {
                // SAFETY: the machine has these instructions (`Isa::detect`).
                return unsafe { panel_avx512(dtype, &job, tiles, scales) };
            }
            let _ = avx512;
            panel_any(dtype, &job, tiles, scales, transpose_any);
        });
        Ok(())
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.region.bytes_mut()
    }
}

/// First byte of the packed matrix, shared by the tasks.
struct Base(*mut u8);

// SAFETY: tasks write to disjoint panels (note at its use).
unsafe impl Sync for Base {}

impl Base {
    fn get(&self) -> *mut u8 {
        self.0
    }
}

/// Source rows `src_row..` go to `lanes` of a panel.
struct PanelJob<'a> {
    src: &'a SourceMatrix<'a>,
    src_row: usize,
    lanes: Range<usize>,
}

/// Rows of a tile before it is transposed: 16 `n` × 16 pairs of `k`.
type Rows = [[u16; TILE_K]; TILE_N];

#[inline(always)]
fn panel_any(
    dtype: DType,
    job: &PanelJob,
    tiles: &mut [u8],
    scales: &mut [u8],
    transpose: impl Fn(&Rows, &mut [u8; 1024]),
) {
    match dtype {
        DType::BF16 => panel_bf16(job, tiles, transpose),
        DType::F32 => panel_f32(job, tiles),
        _ => panel_f8(job, tiles, scales),
    }
}

#[inline(always)]
fn panel_bf16(job: &PanelJob, tiles: &mut [u8], transpose: impl Fn(&Rows, &mut [u8; 1024])) {
    let cols = job.src.cols;
    let mut rows: Rows = [[0; TILE_K]; TILE_N];
    for (tile_idx, tile) in tiles.chunks_exact_mut(1024).enumerate() {
        let tile: &mut [u8; 1024] = tile.try_into().expect("a tile");
        let k = tile_idx * TILE_K;
        let len = TILE_K.min(cols - k);
        for (row, lane) in (job.src_row..).zip(job.lanes.clone()) {
            job.src.read_bf16(row, k, &mut rows[lane][..len]);
            rows[lane][len..].fill(0);
        }
        if job.lanes.len() == TILE_N {
            transpose(&rows, tile);
        } else {
            for lane in job.lanes.clone() {
                for (pair, values) in rows[lane].chunks_exact(2).enumerate() {
                    let at = pair * 64 + lane * 4;
                    tile[at..at + 2].copy_from_slice(&values[0].to_le_bytes());
                    tile[at + 2..at + 4].copy_from_slice(&values[1].to_le_bytes());
                }
            }
        }
    }
}

#[inline(always)]
fn transpose_any(rows: &Rows, tile: &mut [u8; 1024]) {
    for pair in 0..TILE_K / 2 {
        for (lane, row) in rows.iter().enumerate() {
            let at = pair * 64 + lane * 4;
            tile[at..at + 2].copy_from_slice(&row[2 * pair].to_le_bytes());
            tile[at + 2..at + 4].copy_from_slice(&row[2 * pair + 1].to_le_bytes());
        }
    }
}

#[inline(always)]
fn panel_f32(job: &PanelJob, panel: &mut [u8]) {
    let mut rows = [[0f32; TILE_K]; TILE_N];
    for (block_idx, block) in panel.chunks_mut(TILE_K * TILE_N * 4).enumerate() {
        let len = block.len() / (TILE_N * 4);
        for (row, lane) in (job.src_row..).zip(job.lanes.clone()) {
            job.src.read_f32(row, block_idx * TILE_K, &mut rows[lane][..len]);
        }
        for (k, line) in block.chunks_exact_mut(TILE_N * 4).enumerate() {
            for lane in job.lanes.clone() {
                line[lane * 4..lane * 4 + 4].copy_from_slice(&rows[lane][k].to_le_bytes());
            }
        }
    }
}

#[inline(always)]
fn panel_f8(job: &PanelJob, tiles: &mut [u8], scales: &mut [u8]) {
    let cols = job.src.cols;
    let mut codes = [0u8; TILE_K];
    for (tile_idx, tile) in tiles.chunks_exact_mut(512).enumerate() {
        let k = tile_idx * TILE_K;
        let len = TILE_K.min(cols - k);
        for (row, lane) in (job.src_row..).zip(job.lanes.clone()) {
            job.src.read_codes(row, k, &mut codes[..len]);
            codes[len..].fill(0);
            for (k, &code) in codes.iter().enumerate() {
                tile[fp8::offset_in_tile(lane, k)] = code;
            }
        }
    }
    for (block, line) in scales.chunks_exact_mut(TILE_N * 4).enumerate() {
        for (row, lane) in (job.src_row..).zip(job.lanes.clone()) {
            let scale = job.src.scale(row, block * SCALE_K);
            line[lane * 4..lane * 4 + 4].copy_from_slice(&scale.to_le_bytes());
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn panel_avx512(dtype: DType, job: &PanelJob, tiles: &mut [u8], scales: &mut [u8]) {
    panel_any(dtype, job, tiles, scales, |rows, tile| transpose_avx512(rows, tile));
}

/// Transposes 16 × 16 pairs: unpack by 4, by 8, then exchange quarters twice.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn transpose_avx512(rows: &Rows, tile: &mut [u8; 1024]) {
    use std::arch::x86_64::*;
    // SAFETY: each row is 64 bytes.
    let r: [__m512i; 16] = std::array::from_fn(|i| unsafe { _mm512_loadu_si512(rows[i].as_ptr().cast()) });
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    let mut u = t;
    for i in 0..4 {
        u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // u[4 q + c] has, in its 128-bit quarter j, column 4 j + c of rows 4 q .. 4 q + 4.
    for c in 0..4 {
        let (a, b) = (_mm512_shuffle_i32x4::<0x88>(u[c], u[4 + c]), _mm512_shuffle_i32x4::<0x88>(u[8 + c], u[12 + c]));
        let (d, e) = (_mm512_shuffle_i32x4::<0xdd>(u[c], u[4 + c]), _mm512_shuffle_i32x4::<0xdd>(u[8 + c], u[12 + c]));
        let columns = [
            (c, _mm512_shuffle_i32x4::<0x88>(a, b)),
            (8 + c, _mm512_shuffle_i32x4::<0xdd>(a, b)),
            (4 + c, _mm512_shuffle_i32x4::<0x88>(d, e)),
            (12 + c, _mm512_shuffle_i32x4::<0xdd>(d, e)),
        ];
        for (column, values) in columns {
            // SAFETY: column < 16, so 64 bytes from column * 64 lie in the tile.
            unsafe { _mm512_storeu_si512(tile.as_mut_ptr().add(column * 64).cast(), values) };
        }
    }
}
