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
    /// their blocks must be 128 columns wide and the source must begin with the first column of one. Other rows stay as they
    /// are.
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
            let first = src.scales.map_or(0, |s| s.first[1]);
            require(first == 0, OP, "first column in its scale block", || "0".into(), || first.to_string())?;
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

/// Tiles of BF16 that are filled together.
const CHUNK_TILES: usize = 4;

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
        DType::F32 => panel_f32(job, tiles, transpose),
        _ => panel_f8(job, tiles, scales),
    }
}

#[inline(always)]
fn panel_bf16(job: &PanelJob, tiles: &mut [u8], transpose: impl Fn(&Rows, &mut [u8; 1024])) {
    let cols = job.src.cols;
    // Several tiles at once: rows are far apart in the source, and each visit should take more than a cache line.
    let mut chunk: [Rows; CHUNK_TILES] = [[[0; TILE_K]; TILE_N]; CHUNK_TILES];
    for (chunk_idx, tiles) in tiles.chunks_mut(CHUNK_TILES * 1024).enumerate() {
        let k = chunk_idx * CHUNK_TILES * TILE_K;
        for (row, lane) in (job.src_row..).zip(job.lanes.clone()) {
            for (tile_idx, rows) in chunk.iter_mut().enumerate() {
                let k = k + tile_idx * TILE_K;
                if k < cols {
                    job.src.read_bf16((row, k, TILE_K.min(cols - k)), &mut rows[lane]);
                }
            }
        }
        for (rows, tile) in chunk.iter().zip(tiles.chunks_exact_mut(1024)) {
            if job.lanes.len() == TILE_N {
                transpose(rows, tile.try_into().expect("a tile"));
            } else {
                scatter(rows, &job.lanes, tile);
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
fn panel_f32(job: &PanelJob, panel: &mut [u8], transpose: impl Fn(&Rows, &mut [u8; 1024])) {
    // Sixteen columns have the shape of a BF16 tile: 16 rows of 64 bytes, transposed by 4 bytes.
    let mut halves: [Rows; 2] = [[[0; TILE_K]; TILE_N]; 2];
    let mut values = [0f32; TILE_K];
    for (block_idx, block) in panel.chunks_mut(2048).enumerate() {
        let len = block.len() / (TILE_N * 4);
        for (row, lane) in (job.src_row..).zip(job.lanes.clone()) {
            job.src.read_f32((row, block_idx * TILE_K, len), &mut values);
            for (rows, values) in halves.iter_mut().zip(values.chunks_exact(TILE_K / 2)) {
                for (words, value) in rows[lane].chunks_exact_mut(2).zip(values) {
                    let bits = value.to_bits();
                    words[0] = bits as u16;
                    words[1] = (bits >> 16) as u16;
                }
            }
        }
        for (rows, half) in halves.iter().zip(block.chunks_mut(1024)) {
            match <&mut [u8; 1024]>::try_from(&mut *half) {
                Ok(half) if job.lanes.len() == TILE_N => transpose(rows, half),
                _ => scatter(rows, &job.lanes, half),
            }
        }
    }
}

#[inline(always)]
fn panel_f8(job: &PanelJob, tiles: &mut [u8], scales: &mut [u8]) {
    let cols = job.src.cols;
    let mut rows = [[0u8; TILE_K]; TILE_N];
    for (tile_idx, tile) in tiles.chunks_exact_mut(512).enumerate() {
        let k = tile_idx * TILE_K;
        for (row, lane) in (job.src_row..).zip(job.lanes.clone()) {
            job.src.read_codes((row, k, TILE_K.min(cols - k)), &mut rows[lane]);
        }
        if job.lanes.len() == TILE_N {
            transpose_f8(&rows, tile);
        } else {
            for lane in job.lanes.clone() {
                for (k, &code) in rows[lane].iter().enumerate() {
                    tile[fp8::offset_in_tile(lane, k)] = code;
                }
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

/// Sixteen bytes of a tile are four lanes' four codes: the first pairs, then the second.
#[inline(always)]
fn transpose_f8(rows: &[[u8; TILE_K]; TILE_N], tile: &mut [u8]) {
    for (quad, line) in tile.chunks_exact_mut(64).enumerate() {
        for (group, out) in line.chunks_exact_mut(16).enumerate() {
            let (mut first, mut second) = (0u64, 0u64);
            for lane in 0..4 {
                let codes = &rows[group * 4 + lane][quad * 4..quad * 4 + 4];
                first |= u64::from(u16::from_le_bytes([codes[0], codes[1]])) << (16 * lane);
                second |= u64::from(u16::from_le_bytes([codes[2], codes[3]])) << (16 * lane);
            }
            out[..8].copy_from_slice(&first.to_le_bytes());
            out[8..].copy_from_slice(&second.to_le_bytes());
        }
    }
}

/// Writes only some lanes of a tile.
#[inline(always)]
fn scatter(rows: &Rows, lanes: &Range<usize>, tile: &mut [u8]) {
    for lane in lanes.clone() {
        for (line, words) in tile.chunks_exact_mut(64).zip(rows[lane].chunks_exact(2)) {
            line[lane * 4..lane * 4 + 2].copy_from_slice(&words[0].to_le_bytes());
            line[lane * 4 + 2..lane * 4 + 4].copy_from_slice(&words[1].to_le_bytes());
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn panel_avx512(dtype: DType, job: &PanelJob, tiles: &mut [u8], scales: &mut [u8]) {
    panel_any(dtype, job, tiles, scales, |rows, tile| transpose_avx512(rows, tile));
    // Streamed stores are ordered before what this thread does next: telling the others that the task is done.
    std::arch::x86_64::_mm_sfence();
}

/// Transposes 16 × 16 pairs: unpack by 4, by 8, then exchange quarters twice.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn transpose_avx512(rows: &Rows, tile: &mut [u8; 1024]) {
    use std::arch::x86_64::*;
    assert!(tile.as_ptr().cast::<__m512i>().is_aligned());
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
            // SAFETY: column < 16, so 64 bytes from column * 64 lie in the tile, which begins at a multiple of 64 bytes
            // (regions do, panels and tiles are multiples). Weights are not read soon: they need not pass the caches.
            unsafe { _mm512_stream_si512(tile.as_mut_ptr().add(column * 64).cast(), values) };
        }
    }
}
