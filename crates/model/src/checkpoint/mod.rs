//! A model folder's weights: one safetensors file or several with an index, memory-mapped.

mod check;
mod header;
mod unique_map;
mod write;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use moesaic_device::FileMap;
use moesaic_spec::DType;
use serde::Deserialize;

use self::unique_map::UniqueMap;
use crate::ModelError;
pub use write::{RandomWeights, write_random};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Above any real index (DeepSeek-V3's 91,991 tensors take 9 MB).
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// All tensors of a model folder, by name. Opening reads headers only; data is read where it is used.
pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<File>,
    tensors: BTreeMap<String, Entry>,
}

/// `model.safetensors.index.json`; its `metadata` is not needed.
#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

struct Entry {
    file_idx: usize,
    dtype: DType,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// Where a file's bytes are.
struct File {
    path: PathBuf,
    bytes: FileBytes,
}

enum FileBytes {
    Mapped(FileMap),
    /// Inside the binary.
    Embedded(&'static [u8]),
}

impl File {
    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            FileBytes::Mapped(map) => map.bytes(),
            FileBytes::Embedded(bytes) => bytes,
        }
    }
}

/// One tensor: its description and its bytes in the mapped file (little endian, of any alignment).
pub struct StoredTensor<'a> {
    /// Element type on disk.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// All elements.
    pub bytes: &'a [u8],
    file: &'a File,
    range: Range<usize>,
}

impl StoredTensor<'_> {
    /// Lets the system take the file's pages of these bytes back: they were copied to where kernels want them.
    pub fn release(&self, bytes: Range<usize>) {
        assert!(bytes.end <= self.range.len(), "bytes {bytes:?} of a tensor of {}", self.range.len());
        if let FileBytes::Mapped(map) = &self.file.bytes {
            map.release(self.range.start + bytes.start..self.range.start + bytes.end);
        }
    }
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names.
    pub fn open(folder: &Path) -> Result<Checkpoint, ModelError> {
        let index = folder.join(INDEX);
        let mut checkpoint = Checkpoint { folder: folder.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new() };
        if index.exists() {
            checkpoint.open_indexed(&index)?;
        } else {
            let single = folder.join(SINGLE);
            if !single.exists() {
                return Err(ModelError::file(folder, format!("holds neither {SINGLE} nor {INDEX}")));
            }
            checkpoint.add_file(&single)?;
        }
        Ok(checkpoint)
    }

    /// A checkpoint inside the binary; `path` says in messages where it was taken from.
    pub fn embedded(path: &str, bytes: &'static [u8]) -> Result<Checkpoint, ModelError> {
        let mut checkpoint = Checkpoint { folder: PathBuf::from(path), files: Vec::new(), tensors: BTreeMap::new() };
        checkpoint.add(File { path: PathBuf::from(path), bytes: FileBytes::Embedded(bytes) })?;
        Ok(checkpoint)
    }

    /// The folder that was opened.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Every tensor's name, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<StoredTensor<'_>> {
        let entry = self.tensors.get(name)?;
        let file = &self.files[entry.file_idx];
        let bytes = &file.bytes()[entry.range.clone()];
        Some(StoredTensor { dtype: entry.dtype, shape: &entry.shape, bytes, file, range: entry.range.clone() })
    }

    /// The file that a tensor lies in, for messages.
    pub fn file_of(&self, name: &str) -> &Path {
        self.tensors.get(name).map_or(&self.folder, |entry| &self.files[entry.file_idx].path)
    }

    /// Bytes of all files.
    pub fn size_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes().len() as u64).sum()
    }

    fn add_file(&mut self, path: &Path) -> Result<Vec<String>, ModelError> {
        self.add(File { path: path.to_path_buf(), bytes: FileBytes::Mapped(FileMap::open(path)?) })
    }

    /// Adds a file's tensors; their names.
    fn add(&mut self, file: File) -> Result<Vec<String>, ModelError> {
        let entries = header::read(file.bytes()).map_err(|why| ModelError::file(&file.path, why))?;
        let file_idx = self.files.len();
        let mut names = Vec::with_capacity(entries.len());
        for header::Entry { name, dtype, shape, range } in entries {
            if self.tensors.contains_key(&name) {
                let what =
                    format!("tensor '{name}' is also in {}; it must be in one file", self.file_of(&name).display());
                return Err(ModelError::file(&file.path, what));
            }
            names.push(name.clone());
            self.tensors.insert(name, Entry { file_idx, dtype, shape, range });
        }
        self.files.push(file);
        Ok(names)
    }

    fn open_indexed(&mut self, index: &Path) -> Result<(), ModelError> {
        let text = read_limited(index, MAX_INDEX_BYTES)?;
        let index_json: Index =
            serde_json::from_str(&text).map_err(|e| ModelError::file(index, format!("is not a valid index: {e}")))?;
        let mut by_file: BTreeMap<&str, HashSet<&str>> = BTreeMap::new();
        for (name, file) in &index_json.weight_map.0 {
            by_file.entry(file).or_default().insert(name);
        }
        for (file, names) in by_file {
            let path = self.inside(index, file)?;
            let present = self.add_file(&path)?;
            let present: HashSet<&str> = present.iter().map(String::as_str).collect();
            if let Some(missing) = names.difference(&present).min() {
                let what = format!("does not hold tensor '{missing}', which {INDEX} places there");
                return Err(ModelError::file(&path, what));
            }
            if let Some(extra) = present.difference(&names).min() {
                return Err(ModelError::file(
                    &path,
                    format!("holds tensor '{extra}', which {INDEX} does not place there"),
                ));
            }
        }
        Ok(())
    }

    /// A file name of the index as a path inside the folder. Names with folders or `..` are refused, and so are links that
    /// leave the folder, but for the one layout that is made of links: a hub cache's `snapshots/REV/FILE → blobs/HASH`.
    fn inside(&self, index: &Path, file: &str) -> Result<PathBuf, ModelError> {
        let mut components = Path::new(file).components();
        if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
            return Err(ModelError::file(
                index,
                format!("names file '{file}'; a plain file name in the same folder is right"),
            ));
        }
        let path = self.folder.join(file);
        let resolve = |path: &Path| fs::canonicalize(path).map_err(|e| ModelError::file(path, e.to_string()));
        let (target, root) = (resolve(&path)?, resolve(&self.folder)?);
        let snapshots = root.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"));
        let blobs = snapshots.and_then(Path::parent).map(|repository| repository.join("blobs"));
        if target.starts_with(&root) || blobs.is_some_and(|blobs| target.starts_with(blobs)) {
            return Ok(path);
        }
        Err(ModelError::file(&path, format!("is a link to {}, outside the model folder", target.display())))
    }
}

/// Reads a small text file; a larger one than `max_bytes`, or anything that is not a file, is refused unread.
pub(crate) fn read_limited(path: &Path, max_bytes: u64) -> Result<String, ModelError> {
    let failed = |e: std::io::Error| ModelError::file(path, e.to_string());
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(ModelError::file(path, "is not a regular file"));
    }
    if metadata.len() > max_bytes {
        return Err(ModelError::file(path, format!("has {} bytes; at most {max_bytes} are read", metadata.len())));
    }
    fs::read_to_string(path).map_err(failed)
}
