//! The header of one safetensors file: which tensors lie where.
//!
//! The `safetensors` crate can read this too, and writes our files; reading is done here because a refusal must name the
//! tensor, the value and what is right, and because that reader lets a duplicate name win silently and accepts tensors
//! without elements. The format: 8 bytes of header length (little endian), the header (JSON), the data without gaps.

use std::ops::Range;

use moesaic_spec::DType;
use serde::Deserialize;

use super::unique_map::UniqueMap;

/// The format's own limit, and far above any real header (100 bytes a tensor).
const MAX_HEADER_BYTES: usize = 100_000_000;
const LENGTH_BYTES: usize = 8;
/// More dimensions than any tensor of a transformer has.
const MAX_DIMS: usize = 8;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    /// Byte positions in the file.
    pub(super) range: Range<usize>,
}

/// Reads and checks the header of a whole file. Every position in the result lies inside `file`; the error is a sentence
/// without the file's name.
pub(super) fn read(file: &[u8]) -> Result<Vec<Entry>, String> {
    let Some(length) = file.first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("has {} bytes; a safetensors file begins with 8 bytes of header length", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    let room = file.len() - LENGTH_BYTES;
    if length > room as u64 {
        return Err(format!(
            "header length is {length} bytes, but only {room} follow; the file is cut short or not safetensors"
        ));
    }
    let length = length as usize;
    if length > MAX_HEADER_BYTES {
        return Err(format!("header length is {length} bytes; at most {MAX_HEADER_BYTES} are allowed"));
    }
    let header = &file[LENGTH_BYTES..LENGTH_BYTES + length];
    let UniqueMap::<serde_json::Value>(tensors) =
        serde_json::from_slice(header).map_err(|e| format!("header is not valid: {e}"))?;

    let data_start = LENGTH_BYTES + length;
    let data_bytes = file.len() - data_start;
    let mut entries = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        if name == "__metadata__" {
            continue;
        }
        let info = serde_json::from_value(info).map_err(|e| format!("tensor '{name}': {e}"))?;
        entries.push(entry(name, info, data_start, data_bytes)?);
    }
    entries.sort_by_key(|entry| entry.range.start);
    let mut end = data_start;
    for (i, entry) in entries.iter().enumerate() {
        if entry.range.start < end {
            return Err(format!("tensors '{}' and '{}' overlap", entries[i - 1].name, entry.name));
        }
        if entry.range.start > end {
            return Err(format!(
                "{} bytes before tensor '{}' belong to no tensor",
                entry.range.start - end,
                entry.name
            ));
        }
        end = entry.range.end;
    }
    if end < file.len() {
        return Err(format!("{} bytes after the last tensor belong to no tensor", file.len() - end));
    }
    Ok(entries)
}

fn entry(name: String, info: Info, data_start: usize, data_bytes: usize) -> Result<Entry, String> {
    let [begin, end] = info.data_offsets;
    if begin > end || end > data_bytes as u64 {
        return Err(format!(
            "tensor '{name}': data_offsets [{begin}, {end}] lie outside the {data_bytes} bytes of data; the file is cut short or damaged"
        ));
    }
    let Some(dtype) = dtype(&info.dtype) else {
        return Err(format!(
            "tensor '{name}': dtype {} is not supported; F32, F16, BF16, F8_E4M3, F8_E8M0, I64, I32 and U8 are",
            info.dtype
        ));
    };
    if info.shape.len() > MAX_DIMS {
        return Err(format!(
            "tensor '{name}': shape has {} dimensions; at most {MAX_DIMS} are allowed",
            info.shape.len()
        ));
    }
    let bytes = info.shape.iter().try_fold(dtype.size_bytes() as u64, |n, &d| n.checked_mul(d));
    if bytes == Some(0) {
        return Err(format!("tensor '{name}': shape {:?} has no elements", info.shape));
    }
    if bytes != Some(end - begin) {
        return Err(format!(
            "tensor '{name}': shape {:?} of {dtype} is {} bytes, but data_offsets hold {}",
            info.shape,
            bytes.map_or("more than 2^64".to_string(), |n| n.to_string()),
            end - begin
        ));
    }
    let shape = info.shape.iter().map(|&d| d as usize).collect();
    Ok(Entry { name, dtype, shape, range: data_start + begin as usize..data_start + end as usize })
}

fn dtype(name: &str) -> Option<DType> {
    [DType::F32, DType::BF16, DType::F16, DType::F8E4M3, DType::F8E8M0, DType::I64, DType::I32, DType::U8]
        .into_iter()
        .find(|dtype| dtype.to_string() == name)
}

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data_bytes: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.resize(file.len() + data_bytes, 0);
        file
    }

    fn refusal(header: &str, data_bytes: usize) -> String {
        read(&file(header, data_bytes)).unwrap_err()
    }

    #[test]
    fn a_good_header_is_read_in_file_order() {
        let header = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
        let entries = read(&file(header, 16)).unwrap();
        assert_eq!(entries[0].name, "a");
        assert_eq!((entries[1].shape.as_slice(), entries[1].dtype), (&[2, 3][..], DType::BF16));
        assert_eq!(entries[1].range.len(), 12);
    }

    #[test]
    fn each_lie_is_named() {
        let one = |rest: &str| format!(r#"{{"a":{{{rest}}}}}"#);
        let cases = [
            (one(r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#), 4, "data_offsets [0, 8] lie outside the 4 bytes"),
            (one(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), 4, "shape [2] of F32 is 8 bytes, but data_offsets hold 4"),
            (one(r#""dtype":"F32","shape":[0],"data_offsets":[0,0]"#), 0, "shape [0] has no elements"),
            (one(r#""dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]"#), 4, "more than 2^64"),
            (one(r#""dtype":"C64","shape":[1],"data_offsets":[0,8]"#), 8, "dtype C64 is not supported"),
            (one(r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#), 4, "tensor 'a': invalid value"),
            (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#), 8, "4 bytes after the last tensor"),
            (r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#.into(), 2, "1 bytes before tensor 'a'"),
            (
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#.into(),
                3,
                "tensors 'a' and 'b' overlap",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#.into(),
                1,
                "name 'a' appears twice",
            ),
            ("[1]".into(), 0, "header is not valid"),
        ];
        for (header, data_bytes, expected) in cases {
            let refusal = refusal(&header, data_bytes);
            assert!(refusal.contains(expected), "{header}: {refusal}");
        }
        assert!(read(&[1, 2, 3]).unwrap_err().contains("has 3 bytes"));
        assert!(read(&u64::MAX.to_le_bytes()).unwrap_err().contains("header length is 18446744073709551615"));
    }
}
