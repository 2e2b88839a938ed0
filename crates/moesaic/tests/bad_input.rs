//! Strangers' files and wrong settings: exit code 2 and one sentence that says what is wrong and what is right.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Ran, arg, copy_folder, moesaic, moesaic_with_stdin, moesaic_within, temp};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Address space, KiB, that is enough for the binary and a small model, and not for what a lie asks for.
const TWO_GIB: u64 = 2 << 20;

const NORM: &str = "model.norm.weight";
const EMBED: &str = "model.embed_tokens.weight";
const HIDDEN: usize = 32;
const VOCAB: usize = 64;

/// A small valid model in a folder of its own, to be broken.
struct Model {
    _temp: TempDir,
    folder: PathBuf,
}

impl Model {
    fn new(extra: &[&str]) -> Model {
        let temp = temp();
        let folder = temp.path().join("model");
        let args = ["init", "qwen3-30b-a3b", "--output", arg(&folder), "--layers", "1", "--hidden", "32", "--heads"];
        let sizes = ["2", "--experts", "4", "--intermediate", "16", "--vocab", "64"];
        moesaic(&[&args[..], &sizes, extra].concat()).ok();
        Model { _temp: temp, folder }
    }

    fn single() -> Model {
        let model = Model::new(&[]);
        assert_eq!(model.generate().code, Some(0));
        model
    }

    fn sharded() -> Model {
        let model = Model::new(&["--shard-size", "12KB"]);
        assert_eq!(model.generate().code, Some(0));
        model
    }

    fn file(&self) -> PathBuf {
        self.folder.join("model.safetensors")
    }

    fn index(&self) -> PathBuf {
        self.folder.join("model.safetensors.index.json")
    }

    fn generate(&self) -> Ran {
        self.generate_with(&[])
    }

    fn generate_with(&self, extra: &[&str]) -> Ran {
        let args = ["generate", arg(&self.folder), "--prompt-ids", "1,2,3", "-n", "2"];
        moesaic_within(TWO_GIB, &[&args[..], extra].concat())
    }

    /// Rewrites the weights' file.
    fn edit(&self, change: impl FnOnce(&mut Safetensors)) -> &Model {
        edit_file(&self.file(), change);
        self
    }

    fn edit_json(&self, file: &str, change: impl FnOnce(&mut Value)) -> &Model {
        let path = self.folder.join(file);
        let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(&path, json.to_string()).unwrap();
        self
    }

    fn config(&self, field: &str, value: Value) -> &Model {
        self.edit_json("config.json", |config| config[field] = value)
    }
}

/// A safetensors file taken apart.
struct Safetensors {
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl Safetensors {
    fn offsets(&self, name: &str) -> std::ops::Range<usize> {
        let offsets = &self.header[name]["data_offsets"];
        offsets[0].as_u64().unwrap() as usize..offsets[1].as_u64().unwrap() as usize
    }
}

fn edit_file(path: &Path, change: impl FnOnce(&mut Safetensors)) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut file = Safetensors { header, data: bytes[8 + length..].to_vec() };
    change(&mut file);
    write_file(path, &Value::Object(file.header).to_string(), &file.data);
}

fn write_file(path: &Path, header: &str, data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length[..], header.as_bytes(), data].concat()).unwrap();
}

#[test]
fn files_that_are_cut_short() {
    let model = Model::single();
    let whole = fs::read(model.file()).unwrap();
    let header_end = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    for (len, parts) in [
        (0, &["has 0 bytes", "begins with 8 bytes of header length"][..]),
        (5, &["has 5 bytes"]),
        (header_end / 2, &["header length is", "the file is cut short"]),
        (header_end, &["lie outside the 0 bytes of data", "cut short or damaged"]),
        (whole.len() - 1, &["data_offsets", "lie outside the", "cut short or damaged"]),
    ] {
        fs::write(model.file(), &whole[..len]).unwrap();
        model.generate().refused(&[&["model.safetensors: "], parts].concat());
    }
    fs::write(model.file(), [&whole[..], &[0; 3]].concat()).unwrap();
    model.generate().refused(&["model.safetensors: ", "3 bytes after the last tensor belong to no tensor"]);
}

#[test]
fn header_lengths_that_lie() {
    let model = Model::single();
    let whole = fs::read(model.file()).unwrap();
    for length in [whole.len() as u64, 1 << 40, i64::MAX as u64, u64::MAX - 7, u64::MAX] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(model.file(), bytes).unwrap();
        model.generate().refused(&["model.safetensors: header length is", &length.to_string(), "cut short"]);
    }
    for (header, part) in [("[]", "header is not valid"), ("{\"a\":", "header is not valid"), ("\u{0}", "not valid")] {
        write_file(&model.file(), header, &[]);
        model.generate().refused(&["model.safetensors: ", part]);
    }
    // Brackets as deep as the file is long must not exhaust the stack.
    write_file(&model.file(), &"[".repeat(1 << 20), &[]);
    model.generate().refused(&["model.safetensors: header is not valid"]);
    write_file(&model.file(), &format!("{{\"a\":{}", "{\"a\":".repeat(1 << 18)), &[]);
    model.generate().refused(&["model.safetensors: header is not valid"]);
}

#[test]
fn offsets_that_lie() {
    let model = Model::single();
    let kept = fs::read(model.file()).unwrap();
    let broken = |change: &dyn Fn(&mut Safetensors)| {
        fs::write(model.file(), &kept).unwrap();
        model.edit(change).generate()
    };
    let file = "model.safetensors: ";
    for end in [1u64 << 33, 1 << 62, u64::MAX] {
        let ran = broken(&|file| file.header[NORM]["data_offsets"][1] = json!(end));
        ran.refused(&[file, NORM, &format!("{end}] lie outside the")]);
    }
    let ran = broken(&|file| file.header[NORM]["data_offsets"] = json!([8, 0]));
    ran.refused(&[file, NORM, "data_offsets [8, 0] lie outside"]);
    for offsets in [json!([-1, 8]), json!([0.5, 8]), json!([0]), json!("0"), json!([1e30, 2e30])] {
        broken(&|file| file.header[NORM]["data_offsets"] = offsets.clone()).refused(&[file, NORM]);
    }
    // Two tensors in the same place.
    let ran = broken(&|file| {
        let norm = "model.layers.0.input_layernorm.weight";
        file.header[NORM]["data_offsets"] = file.header[norm]["data_offsets"].clone();
    });
    ran.refused(&[file, "overlap", NORM]);
    // One that begins before its neighbour ends.
    let ran = broken(&|file| {
        let range = file.offsets(NORM);
        let shifted = if range.start > 0 { range.start - 2..range.end - 2 } else { 2..range.end + 2 };
        file.header[NORM]["data_offsets"] = json!([shifted.start, shifted.end]);
    });
    ran.refused(&[file, NORM]);
    // A gap.
    let ran = broken(&|file| {
        file.header.remove(NORM);
    });
    ran.refused(&[file, "belong to no tensor"]);
}

#[test]
fn shapes_and_types_that_are_wrong() {
    let model = Model::single();
    let kept = fs::read(model.file()).unwrap();
    let broken = |change: &dyn Fn(&mut Safetensors)| {
        fs::write(model.file(), &kept).unwrap();
        model.edit(change).generate()
    };
    let file = "model.safetensors: ";
    let norm_bytes = 2 * HIDDEN;
    let ran = broken(&|file| file.header[NORM]["shape"] = json!([0]));
    ran.refused(&[file, NORM, "shape [0] has no elements"]);
    let ran = broken(&|file| {
        file.header.insert("nothing".into(), json!({"dtype": "BF16", "shape": [4, 0], "data_offsets": [0, 0]}));
    });
    ran.refused(&[file, "'nothing'", "shape [4, 0] has no elements"]);
    let ran = broken(&|file| file.header[NORM]["shape"] = json!([HIDDEN + 1]));
    ran.refused(&[file, NORM, &format!("is {} bytes, but data_offsets hold {norm_bytes}", norm_bytes + 2)]);
    let ran = broken(&|file| file.header[NORM]["shape"] = json!([1u64 << 40, 1u64 << 40]));
    ran.refused(&[file, NORM, "more than 2^64"]);
    let ran = broken(&|file| file.header[NORM]["shape"] = json!([HIDDEN / 2, 2]));
    ran.refused(&[file, NORM, "has shape [16, 2]; the config asks for [32]"]);
    let ran = broken(&|file| file.header[NORM]["shape"] = json!(vec![1; 1000]));
    ran.refused(&[file, NORM, "shape has 1000 dimensions"]);
    let ran = broken(&|file| file.header[NORM]["dtype"] = json!("C64"));
    ran.refused(&[file, NORM, "dtype C64 is not supported", "BF16"]);
    let ran = broken(&|file| {
        file.header[NORM]["dtype"] = json!("I32");
        file.header[NORM]["shape"] = json!([HIDDEN / 2]);
    });
    ran.refused(&[file, NORM, "[16]", "[32]"]);
    // The right shape in a type that no weight has.
    let ran = broken(&|file| {
        let range = file.offsets(EMBED);
        file.header[EMBED]["dtype"] = json!("U8");
        file.header[EMBED]["data_offsets"] = json!([range.start, range.start + VOCAB * HIDDEN]);
        let pad = json!({"dtype": "U8", "shape": [VOCAB * HIDDEN],
            "data_offsets": [range.start + VOCAB * HIDDEN, range.end]});
        file.header.insert("pad".into(), pad);
    });
    ran.refused(&[file, EMBED, "is U8; BF16 or F16 or F32 is right"]);
}

#[test]
fn names_that_are_missing_or_too_many() {
    let model = Model::single();
    let kept = fs::read(model.file()).unwrap();
    let broken = |change: &dyn Fn(&mut Safetensors)| {
        fs::write(model.file(), &kept).unwrap();
        model.edit(change).generate()
    };
    let rename = |from: &'static str, to: &'static str| {
        move |file: &mut Safetensors| {
            let entry = file.header.remove(from).unwrap();
            file.header.insert(to.into(), entry);
        }
    };
    let ran = broken(&rename(NORM, "model.nrom.weight"));
    ran.refused(&[arg(&model.folder), "tensor 'model.norm.weight' [32] is missing"]);
    let ran = broken(&|file| {
        let end = file.data.len();
        file.data.extend([0; 4]);
        let extra = json!({"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]});
        file.header.insert("model.layers.1.input_layernorm.weight".into(), extra);
    });
    ran.refused(&["model.safetensors: ", "model.layers.1.input_layernorm.weight", "qwen3_moe", "does not have"]);
    // The same name twice in one file.
    fs::write(model.file(), &kept).unwrap();
    model.edit(|_| ());
    let bytes = fs::read(model.file()).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    let one: Value = serde_json::from_str(header).unwrap();
    let twice = format!("{{\"{NORM}\":{},{}", one[NORM], &header[1..]);
    write_file(&model.file(), &twice, &bytes[8 + length..]);
    model.generate().refused(&["model.safetensors: ", "name 'model.norm.weight' appears twice"]);
}

#[test]
fn shards_that_disagree() {
    let files = |model: &Model| -> Vec<String> {
        let index: Value = serde_json::from_slice(&fs::read(model.index()).unwrap()).unwrap();
        let mut files: Vec<String> =
            index["weight_map"].as_object().unwrap().values().map(|file| file.as_str().unwrap().to_string()).collect();
        files.sort();
        files.dedup();
        files
    };
    let index = "model.safetensors.index.json";
    // A tensor in two files.
    let model = Model::sharded();
    let [first, .., last] = &files(&model)[..] else { panic!("one file only") };
    let mut one = None;
    edit_file(&model.folder.join(first), |file| {
        let name = file.header.keys().find(|name| *name != "__metadata__").unwrap().clone();
        one = Some((name.clone(), file.header[&name].clone(), file.data[file.offsets(&name)].to_vec()));
    });
    let (name, entry, bytes) = one.unwrap();
    edit_file(&model.folder.join(last), |file| {
        let mut entry = entry;
        entry["data_offsets"] = json!([file.data.len(), file.data.len() + bytes.len()]);
        file.data.extend(&bytes);
        file.header.insert(name.clone(), entry);
    });
    model.generate().refused(&[last, &name, first, "must be in one file"]);

    // The index places it elsewhere, or nowhere.
    let model = Model::sharded();
    model.edit_json(index, |json| json["weight_map"][&name] = json!(last));
    let ran = model.generate();
    assert!(ran.stderr.contains(&name) && ran.stderr.contains(index), "{ran:#?}");
    ran.refused(&["place"]);
    let model = Model::sharded();
    model.edit_json(index, |json| {
        json["weight_map"].as_object_mut().unwrap().remove(&name).unwrap();
    });
    model.generate().refused(&[first, &name, "which model.safetensors.index.json does not place there"]);
    let model = Model::sharded();
    model.edit_json(index, |json| json["weight_map"]["ghost"] = json!(first));
    model.generate().refused(&[first, "does not hold tensor 'ghost'"]);

    // A file that is not there, an index that is none.
    let model = Model::sharded();
    fs::remove_file(model.folder.join(last)).unwrap();
    model.generate().refused(&[last, "No such file"]);
    for (text, part) in [("{", "is not a valid index"), ("{}", "weight_map"), ("{\"weight_map\":[]}", "an object")] {
        fs::write(model.index(), text).unwrap();
        model.generate().refused(&[index, part]);
    }
    fs::write(model.index(), format!("{{\"weight_map\":{{\"a\":{first:?},\"a\":{last:?}}}}}")).unwrap();
    model.generate().refused(&[index, "name 'a' appears twice"]);
    fs::remove_file(model.index()).unwrap();
    model.generate().refused(&["holds neither model.safetensors nor model.safetensors.index.json"]);
}

#[test]
fn an_index_that_leads_out_of_the_folder() {
    let index = "model.safetensors.index.json";
    let model = Model::sharded();
    let name = {
        let json: Value = serde_json::from_slice(&fs::read(model.index()).unwrap()).unwrap();
        json["weight_map"].as_object().unwrap().keys().next().unwrap().clone()
    };
    for file in ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "./x", "a/../b"] {
        model.edit_json(index, |json| json["weight_map"][&name] = json!(file));
        model.generate().refused(&[index, &format!("'{file}'"), "a plain file name in the same folder is right"]);
    }
}

#[cfg(unix)]
#[test]
fn links_may_lead_into_a_hub_cache_and_nowhere_else() {
    use std::os::unix::fs::symlink;
    let model = Model::sharded();
    let shards = || {
        let entries =
            fs::read_dir(&model.folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        entries.filter(|name| name.ends_with(".safetensors")).collect::<Vec<_>>()
    };
    let temp = temp();

    // models--a--b/snapshots/REV/FILE → ../../blobs/HASH
    let snapshot = temp.path().join("models--a--b/snapshots/0123abcd");
    let blobs = temp.path().join("models--a--b/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    for (i, entry) in fs::read_dir(&model.folder).unwrap().enumerate() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), blobs.join(format!("{i:064x}"))).unwrap();
        symlink(format!("../../blobs/{i:064x}"), snapshot.join(entry.file_name())).unwrap();
    }
    let args = |folder: &Path| {
        let args = ["generate", arg(folder), "--prompt-ids", "1,2,3", "-n", "2", "--json"];
        args.map(str::to_string)
    };
    let through_links = moesaic(&args(&snapshot)).json();
    assert_eq!(through_links, moesaic(&args(&model.folder)).json());

    // The same link, where there is no hub cache around it.
    let outside = temp.path().join("outside.safetensors");
    let linked = temp.path().join("linked");
    copy_folder(&model.folder, &linked);
    let shard = shards().remove(0);
    fs::rename(linked.join(&shard), &outside).unwrap();
    symlink(&outside, linked.join(&shard)).unwrap();
    moesaic(&args(&linked)).refused(&[&shard, "is a link to", "outside.safetensors", "outside the model folder"]);
    // And out of the hub cache.
    fs::remove_file(snapshot.join(&shard)).unwrap();
    symlink(&outside, snapshot.join(&shard)).unwrap();
    moesaic(&args(&snapshot)).refused(&[&shard, "outside the model folder"]);
    // A link within the folder is fine, one to itself is not.
    fs::remove_file(linked.join(&shard)).unwrap();
    fs::copy(&outside, linked.join("elsewhere")).unwrap();
    symlink("elsewhere", linked.join(&shard)).unwrap();
    moesaic(&args(&linked)).ok();
    fs::remove_file(linked.join(&shard)).unwrap();
    symlink(&shard, linked.join(&shard)).unwrap();
    moesaic(&args(&linked)).refused(&[&shard]);
}

#[test]
fn weights_that_are_no_numbers() {
    let model = Model::single();
    let kept = fs::read(model.file()).unwrap();
    let expert = "model.layers.0.mlp.experts.2.down_proj.weight";
    for (name, element, bits) in [(EMBED, 7, 0x7fc0u16), (expert, 100, 0x7f80), (NORM, 31, 0xff80)] {
        fs::write(model.file(), &kept).unwrap();
        model.edit(|file| {
            let at = file.offsets(name).start + 2 * element;
            file.data[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        });
        let place = format!("tensor '{name}': element {element} is not a finite number");
        model.generate().refused(&["model.safetensors: ", &place]);
    }
}

#[test]
fn configs_that_describe_no_model() {
    let model = Model::single();
    let kept = fs::read(model.folder.join("config.json")).unwrap();
    for (field, value, parts) in [
        ("num_experts_per_tok", json!(5), &["`num_experts_per_tok` is 5", "4"][..]),
        ("num_experts", json!(1), &["num_experts"]),
        ("model_type", json!("gpt2"), &["`model_type` is \"gpt2\"", "not a known family", "qwen3_moe"]),
        ("model_type", Value::Null, &["model_type"]),
        ("hidden_size", json!("big"), &["`hidden_size` is \"big\""]),
        ("hidden_size", json!(-32), &["`hidden_size` is -32"]),
        ("hidden_size", Value::Null, &["`hidden_size` is missing"]),
        ("num_key_value_heads", json!(3), &["`num_key_value_heads` is 3", "num_attention_heads"]),
        ("rms_norm_eps", json!(0), &["`rms_norm_eps` is 0"]),
        ("rope_theta", json!("x"), &["rope_theta"]),
        ("torch_dtype", json!("int3"), &["int3"]),
    ] {
        fs::write(model.folder.join("config.json"), &kept).unwrap();
        model.config(field, value).generate().refused(&[&["config.json: "], parts].concat());
    }
    for (text, parts) in [
        ("not json", &["not valid JSON at line 1, column"][..]),
        ("{\"model_type\": ", &["not valid JSON"]),
        ("[1, 2]", &["must be a JSON object"]),
        ("", &["not valid JSON"]),
    ] {
        fs::write(model.folder.join("config.json"), text).unwrap();
        model.generate().refused(&[&["config.json: "], parts].concat());
        moesaic(&["inspect", arg(&model.folder)]).refused(&["config.json: "]);
    }
    fs::remove_file(model.folder.join("config.json")).unwrap();
    model.generate().refused(&[arg(&model.folder), "holds no config.json"]);
    moesaic(&["generate", "/no/such/folder", "--prompt", "x"]).refused(&["/no/such/folder"]);
    moesaic(&["inspect", "qwen4"]).refused(&["qwen4"]);
}

/// Sizes beyond all bounds are refused as fields; sizes within them are met by tensors that are not there, or by the ledger.
/// In no case is anything allocated that they ask for.
#[test]
fn sizes_that_nothing_can_hold() {
    let model = Model::single();
    let kept = fs::read(model.folder.join("config.json")).unwrap();
    for (field, value) in [
        ("vocab_size", json!(1u64 << 40)),
        ("hidden_size", json!(u64::MAX)),
        ("num_hidden_layers", json!(1_000_000_000)),
        ("num_experts", json!(1u64 << 32)),
        ("moe_intermediate_size", json!(1u64 << 50)),
        ("num_attention_heads", json!(1u64 << 33)),
        ("head_dim", json!(1u64 << 31)),
        ("max_position_embeddings", json!(u64::MAX)),
        ("hidden_size", json!(1e300)),
    ] {
        fs::write(model.folder.join("config.json"), &kept).unwrap();
        model.config(field, value).generate().refused(&["config.json: ", &format!("`{field}` is "), "must be"]);
    }
    for (field, value) in [
        ("vocab_size", json!(1 << 24)),
        ("hidden_size", json!(1 << 18)),
        ("num_hidden_layers", json!(1000)),
        ("num_experts", json!(4096)),
        ("moe_intermediate_size", json!(1 << 20)),
        ("num_attention_heads", json!(4096)),
    ] {
        fs::write(model.folder.join("config.json"), &kept).unwrap();
        model.config(field, value.clone()).generate().refused(&["tensor '"]);
        // The same with random weights: the ledger refuses, or it runs if it is small enough.
        let args = ["generate", arg(&model.folder), "--load-format", "dummy", "--prompt-ids", "1", "-n", "1"];
        let ran = moesaic_within(TWO_GIB, &[&args[..], &["--memory-limit", "100MB"]].concat());
        if ran.code != Some(0) {
            ran.refused(&["cannot fit: weights"]);
        }
    }
}

/// A context that no memory holds must be refused by the ledger, not by the allocator.
#[test]
fn contexts_that_nothing_can_hold() {
    let model = Model::single();
    model.config("max_position_embeddings", json!(1 << 27));
    let long = (1usize << 27).to_string();
    model.generate_with(&["--max-model-len", &long]).refused(&["cannot fit: weights", "--max-model-len"]);
    let many = ["--max-model-len", &long, "--max-num-seqs", "65536", "--max-num-batched-tokens", "1048576"];
    model.generate_with(&many).refused(&["cannot fit: weights", "--max-model-len"]);
    model.generate_with(&["--block-size", "8", "--max-model-len", &long]).refused(&["cannot fit: weights"]);
    let bench = ["bench", "throughput", arg(&model.folder), "--input-len", &long, "--output-len", "1"];
    moesaic_within(TWO_GIB, &bench).refused(&[]);
}

/// All sizes at their largest, which no machine word holds the products of.
#[test]
fn the_largest_sizes_that_a_config_may_have() {
    let model = Model::single();
    for (field, value) in [
        ("vocab_size", 1 << 24),
        ("hidden_size", 1 << 18),
        ("num_hidden_layers", 8),
        ("num_attention_heads", 4096),
        ("num_key_value_heads", 4096),
        ("head_dim", 4096),
        ("num_experts", 4096),
        ("moe_intermediate_size", 1 << 20),
        ("max_position_embeddings", 1 << 27),
    ] {
        model.config(field, json!(value));
    }
    let long = (1usize << 27).to_string();
    let most = ["--max-model-len", &long, "--max-num-seqs", "65536", "--max-num-batched-tokens", "1048576"];
    let ran = model.generate_with(&[&most[..], &["--load-format", "dummy"]].concat());
    ran.refused(&["cannot fit: weights", "may be used"]);
}

#[test]
fn many_more_threads_than_cores() {
    let args = ["generate", "--prompt", "x", "-n", "2", "--num-threads", "1024"];
    moesaic(&args).refused(&["num_threads is 1024", "is right on this machine"]);
}

#[test]
fn a_tokenizer_of_another_model() {
    let model = Model::single();
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny-moe");
    fs::copy(examples.join("tokenizer.json"), model.folder.join("tokenizer.json")).unwrap();
    let args = ["generate", arg(&model.folder), "--prompt", "x"];
    moesaic(&args).refused(&["64", "token"]);
    fs::write(model.folder.join("tokenizer.json"), "{}").unwrap();
    moesaic(&args).refused(&["tokenizer.json"]);
    fs::remove_file(model.folder.join("tokenizer.json")).unwrap();
    moesaic(&args).refused(&[arg(&model.folder), "holds no tokenizer.json", "--prompt-ids"]);
}

#[test]
fn prompts_that_cannot_run() {
    moesaic(&["generate", "--prompt", ""]).refused(&["the prompt is empty", "--prompt"]);
    let model = Model::single();
    let run = |ids: &str| moesaic(&["generate", arg(&model.folder), "--prompt-ids", ids, "-n", "2"]);
    run("1,64").refused(&["prompt is token id 64", "below the model's vocab_size 64"]);
    run("4294967295").refused(&["token id 4294967295"]);
    model.config("max_position_embeddings", json!(8));
    run("1,2,3,4,5,6,7").ok();
    run("1,2,3,4,5,6,7,8").refused(&["the prompt has 8 tokens", "at most 7", "context of 8"]);
    // 2,048 tokens of context inside the binary.
    let long = "word ".repeat(5000);
    moesaic(&["generate", "--prompt", &long]).refused(&["the prompt has", "context of 2048"]);
    moesaic_with_stdin(&["generate"], &long).refused(&["the prompt has", "context of 2048"]);
    let args = ["generate", "--prompt", "a b c d e f g h i j k l", "--max-model-len", "4"];
    moesaic(&args).refused(&["max_model_len", "4"]);
}

#[test]
fn settings_out_of_range() {
    let run = |extra: &[&str]| moesaic(&[&["generate", "--prompt", "x", "-n", "2"], extra].concat());
    for (flag, value, parts) in [
        ("--temperature", "-1", &["temperature is -1", "0 (greedy) or a number above it"][..]),
        ("--temperature", "nan", &["temperature is NaN", "0 (greedy) or a number above it"]),
        ("--temperature", "inf", &["temperature is inf"]),
        ("--top-p", "0", &["top_p is 0", "above 0 and at most 1"]),
        ("--top-p", "1.5", &["top_p is 1.5"]),
        ("--min-p", "-0.1", &["min_p is -0.1", "from 0 to 1"]),
        ("--repetition-penalty", "0", &["repetition_penalty is 0", "above 0"]),
        ("--presence-penalty", "nan", &["presence_penalty is NaN", "-2 to 2"]),
        ("--frequency-penalty", "3", &["frequency_penalty is 3"]),
        ("--max-tokens", "0", &["--max-tokens is 0", "1 or more"]),
        ("--max-num-seqs", "0", &["--max-num-seqs is 0"]),
        ("--num-threads", "0", &["--num-threads is 0"]),
        ("--num-threads", "1000000", &["--num-threads is 1000000"]),
        ("--block-size", "7", &["--block-size is 7", "a multiple of 8 from 8 to 1024"]),
        ("--block-size", "0", &["--block-size is 0"]),
        ("--memory-utilization", "0", &["--memory-utilization is 0", "at most 1"]),
        ("--memory-utilization", "nan", &["--memory-utilization is NaN"]),
        ("--moe-expert-capacity-factor", "0", &["--moe-expert-capacity-factor is 0"]),
        ("--max-model-len", "0", &["max_model_len is 0", "1 to"]),
        ("--max-model-len", "4096", &["max_model_len is 4096", "max_position_embeddings 2048"]),
        ("--stop", "", &["stop"]),
    ] {
        // clap has -n already.
        let ran = if flag == "--max-tokens" {
            moesaic(&["generate", "--prompt", "x", flag, value])
        } else {
            run(&[flag, value])
        };
        ran.refused(parts);
    }
    let error =
        run(&["--memory-limit", "1MB"]).refused(&["cannot fit: weights", "KV cache", "activations", "workspace"]);
    for way_out in ["any of these would fix it", "976.56 KiB may be used", "--memory-utilization, --memory-limit"] {
        assert!(error.contains(way_out), "no {way_out:?} in {error}");
    }
    // What it says would be enough is enough.
    let budget = error.rsplit_once(", or ").unwrap().1.split(" of memory").next().unwrap().replace(' ', "");
    let (number, unit) = budget.split_at(budget.find(|c: char| c.is_alphabetic()).unwrap());
    let enough = format!("{}{unit}", number.parse::<f64>().unwrap() + 0.01);
    assert_eq!(run(&["--memory-limit", &enough]).code, Some(0), "{enough}");
    run(&["--kv-cache-memory-bytes", "1KB"]).refused(&["KV cache"]);

    // What clap itself refuses says how it is used, too.
    for args in [&["generate", "--memory-limit", "1 parsec"][..], &["generate", "--no-such-flag"], &["walk"]] {
        let ran = moesaic(args);
        assert_eq!(ran.code, Some(2), "{ran:#?}");
        assert!(ran.stderr.starts_with("error: ") && !ran.stderr.contains("panicked"), "{ran:#?}");
    }
}

#[test]
fn scales_that_fit_nothing() {
    let temp = temp();
    let output = temp.path().join("model");
    for (extra, parts) in [
        (&["--experts", "0"][..], &["experts is 0", "from 1 to"][..]),
        (&["--hidden", "99999999999"], &["hidden is 99999999999"]),
        (&["--vocab", "0"], &["vocab is 0"]),
        (&["--layers", "0"], &["layers is 0"]),
    ] {
        moesaic(&[&["init", "qwen3-30b-a3b", "--output", arg(&output)], extra].concat()).refused(parts);
        assert!(!output.exists(), "nothing is written before all is checked");
    }
    let file = temp.path().join("file");
    fs::write(&file, "x").unwrap();
    let args =
        ["init", "qwen3-30b-a3b", "--layers", "1", "--hidden", "32", "--vocab", "64", "--experts", "2", "--output"];
    moesaic(&[&args[..], &[arg(&file)]].concat()).refused(&[arg(&file)]);
}
