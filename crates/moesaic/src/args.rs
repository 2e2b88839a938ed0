//! The command line, spelled as in vLLM where vLLM has the flag.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use moesaic_engine::EngineConfig;
use moesaic_model::LoadDType;
use moesaic_plan::Strategy;
use moesaic_planner::cost::Stack;
use moesaic_spec::{Bytes, DropPolicy};

/// Plans, runs and measures Mixture-of-Experts transformers.
#[derive(Parser)]
#[command(name = "moesaic", version, about, propagate_version = true)]
#[command(after_help = "Examples:\n  \
    moesaic generate --prompt \"It was a fine morning, and\"     the model inside the binary\n  \
    moesaic generate ./Qwen3-30B-A3B --chat                    talk to a Hugging Face model folder\n  \
    moesaic compare                                            five ways to spread a model over 16 ranks\n  \
    moesaic inspect deepseek-v3                                what a model is, without its weights\n  \
    moesaic bench latency ./model --batch-size 1,4,16          how fast, and how near the machine's limit")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Continue a prompt, or chat.
    Generate(GenerateArgs),
    /// Say what a model is: parameters, bytes, KV cache, FLOPs.
    Inspect(InspectArgs),
    /// Write a random checkpoint of any preset or config, scaled to any size.
    Init(InitArgs),
    /// Run a model under several plans on local ranks, and set them side by side.
    Compare(CompareArgs),
    /// Find the best plan for a model, a cluster and a workload.
    Plan(PlanArgs),
    /// Say what a plan does, what binds it and what would help: who owns what, what crosses which links, what waits for what.
    Explain(ExplainArgs),
    /// Run the scheduler on a virtual clock: latencies, goodput and use of the cache under a plan.
    Simulate(SimulateArgs),
    /// Say in which fields two plan files differ.
    Diff {
        /// A plan file.
        a: PathBuf,
        /// Another.
        b: PathBuf,
    },
    /// Hold the papers' figures against what is predicted, and against physics.
    Reproduce(ReproduceArgs),
    /// Hold the planner's predictions against what others measured.
    Validate(ValidateArgs),
    /// Measure latency or throughput.
    Bench(BenchArgs),
    /// Measure this machine's ops and links, as many as a model needs, into tables.
    Profile(ProfileArgs),
    /// Say what this machine has.
    Doctor(DoctorArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
    /// Be one rank of another process's plan.
    #[command(hide = true)]
    Rank(RankArgs),
}

/// A rank that another process has started.
#[derive(Args)]
pub(crate) struct RankArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Where the ranks meet.
    #[arg(long)]
    pub folder: PathBuf,
    /// Which one this is.
    #[arg(long)]
    pub rank: u32,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    moesaic compare                                            the small model inside, five strategies on 16 ranks\n  \
    moesaic compare ./model --cluster dgx-h100-x2 --workload decode\n  \
    moesaic compare --strategy ep,ma --trace trace.json        with a timeline for Perfetto or chrome://tracing\n  \
    moesaic compare --plan a.yaml b.yaml                       plans of your own")]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Plan files to compare; without, the five strategies, as far as model and ranks allow them.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["strategy", "cluster", "ranks"], help_heading = "Plans")]
    pub plan: Vec<PathBuf>,
    /// Some of the strategies only.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAMES", help_heading = "Plans")]
    pub strategy: Vec<StrategyArg>,
    /// Ranks of each strategy [default: 16, or all that a smaller cluster has].
    #[arg(long, value_name = "N", help_heading = "Plans")]
    pub ranks: Option<usize>,
    /// Cluster that times are priced for: a preset or a file [default: a100-4x4, or what the plans name].
    #[arg(long, value_name = "CLUSTER", help_heading = "Plans")]
    pub cluster: Option<String>,
    /// Requests: a preset or a file [default: chat-small, or what the plans name].
    #[arg(long, value_name = "WORKLOAD", help_heading = "Plans")]
    pub workload: Option<String>,
    /// Folder for the report (HTML, Markdown, JSON) and the plan files.
    #[arg(short, long, value_name = "DIR", default_value = "moesaic-compare", help_heading = "Output")]
    pub output: PathBuf,
    /// Write a timeline of the first steps, a row a rank and lane (Chrome trace; with several plans a file each).
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub trace: Option<PathBuf>,
    /// No progress on standard error.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    moesaic reproduce                                          all five papers, into docs/papers.md\n  \
    moesaic reproduce 003 004 --output ma.md --json ma.json    two of them, also as JSON")]
pub(crate) struct ReproduceArgs {
    /// Which papers [default: all].
    #[arg(value_name = "PAPER")]
    pub papers: Vec<String>,
    /// The document (Markdown); its plots go into a folder of the same name beside it.
    #[arg(short, long, value_name = "FILE", default_value = "docs/papers.md")]
    pub output: PathBuf,
    /// Everything as JSON, too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    moesaic plan deepseek-v3 --cluster hgx-h200-x4 --workload decode --tpot 50ms\n  \
    moesaic plan deepseek-v3 --cluster dgx-h100 --gpus 32..96 --tpot 50ms --ttft 2s\n  \
    moesaic plan mixtral-8x7b --cluster a100-4x4 --tolerate-failures 1 --output ./plans")]
pub(crate) struct PlanArgs {
    /// Preset, model folder or config.json.
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// A preset or a file; a preset grows with --gpus.
    #[arg(long, value_name = "CLUSTER")]
    pub cluster: String,
    /// Lengths of prompts and answers: a preset or a file.
    #[arg(long, value_name = "WORKLOAD", default_value = "chat")]
    pub workload: String,
    /// GPUs to use, N or N..M [default: all of the cluster].
    #[arg(long, value_name = "N|N..M", value_parser = parse_gpus, help_heading = "Goals")]
    pub gpus: Option<(usize, usize)>,
    /// Time to first token at most (500ms, 1.5s).
    #[arg(long, value_name = "TIME", value_parser = parse_seconds, help_heading = "Goals")]
    pub ttft: Option<f64>,
    /// Time per output token at most (30ms).
    #[arg(long, value_name = "TIME", value_parser = parse_seconds, help_heading = "Goals")]
    pub tpot: Option<f64>,
    /// GPUs of a plan that may fail while it goes on and keeps the goals.
    #[arg(long, value_name = "F", default_value_t = 0, help_heading = "Goals")]
    pub tolerate_failures: usize,
    /// Requests at a time, over all GPUs; several are tried [default: as many as are best].
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..), help_heading = "Goals")]
    pub concurrency: Vec<u32>,
    /// Rows travel to experts exactly as computed, and not in 8 bits.
    #[arg(long, help_heading = "Goals")]
    pub exact_exchange: bool,
    #[command(flatten)]
    pub pricing: PricingArgs,
    /// Look for prompts and answers on GPUs of their own (disaggregated prefill and decoding), too.
    #[arg(long, conflicts_with = "concurrency", help_heading = "Goals")]
    pub disaggregate: bool,
    /// Plans of each frontier at most.
    #[arg(long, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..), help_heading = "Output")]
    pub top: u16,
    /// Folder for the page (HTML), the data (JSON) and the plan files.
    #[arg(short, long, value_name = "DIR", default_value = "moesaic-plan", help_heading = "Output")]
    pub output: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum StrategyArg {
    /// Tensor parallelism.
    Tp,
    /// Pipeline stages.
    Pp,
    /// Both.
    #[value(name = "tp+pp", alias = "tp-pp")]
    TpPp,
    /// Large expert parallelism.
    Ep,
    /// Attention and experts on ranks of their own.
    Ma,
}

impl From<StrategyArg> for Strategy {
    fn from(arg: StrategyArg) -> Strategy {
        match arg {
            StrategyArg::Tp => Strategy::Tp,
            StrategyArg::Pp => Strategy::Pp,
            StrategyArg::TpPp => Strategy::TpPp,
            StrategyArg::Ep => Strategy::Ep,
            StrategyArg::Ma => Strategy::Ma,
        }
    }
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    moesaic explain moesaic-compare/plans/ep16.yaml\n  \
    moesaic explain plan.yaml --model ./model --schedule 3     with the actions of rank 3, in order")]
pub(crate) struct ExplainArgs {
    /// A plan file.
    #[arg(value_name = "PLAN")]
    pub plan: PathBuf,
    /// The model, where it is not the one that the plan names: preset, model folder or config.json.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Print the schedules of these ranks, too.
    #[arg(long, value_name = "RANKS", value_delimiter = ',')]
    pub schedule: Vec<u32>,
    #[command(flatten)]
    pub predict: PredictArgs,
}

/// What a plan is predicted for.
#[derive(Args)]
pub(crate) struct PredictArgs {
    /// Cluster: a preset or a file [default: what the plan names].
    #[arg(long, value_name = "CLUSTER", help_heading = "Prediction")]
    pub cluster: Option<String>,
    /// Requests: a preset or a file [default: what the plan names].
    #[arg(long, value_name = "WORKLOAD", help_heading = "Prediction")]
    pub workload: Option<String>,
    /// So many users, each of whom asks again when answered, instead of the workload's arrivals.
    #[arg(long, value_name = "N", help_heading = "Prediction")]
    pub concurrency: Option<usize>,
    #[command(flatten)]
    pub pricing: PricingArgs,
}

/// What predictions price by.
#[derive(Args, Clone)]
pub(crate) struct PricingArgs {
    /// Program whose kernels are priced, and whose own time, where it was measured, is part of what users see.
    #[arg(long, value_name = "PROGRAM", value_enum, default_value_t, help_heading = "Prediction")]
    pub backend: BackendArg,
    /// Price ops and links from the tables in this folder, which moesaic profile wrote, instead.
    #[arg(long, value_name = "DIR", conflicts_with = "backend", help_heading = "Prediction")]
    pub tables: Option<PathBuf>,
    /// Load of the experts: uniform, zipf:S, power-law:A, or the file of a routing trace that compare wrote.
    #[arg(long, value_name = "ROUTING", default_value = "uniform", help_heading = "Prediction")]
    pub routing: String,
}

#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
pub(crate) enum BackendArg {
    /// SGLang.
    #[default]
    Sglang,
    /// vLLM.
    Vllm,
    /// NVIDIA TensorRT-LLM.
    Trtllm,
    /// This project: users see what iterations take, and nothing is added.
    Moesaic,
}

impl From<BackendArg> for Stack {
    fn from(arg: BackendArg) -> Stack {
        match arg {
            BackendArg::Sglang => Stack::Sglang,
            BackendArg::Vllm => Stack::Vllm,
            BackendArg::Trtllm => Stack::Trtllm,
            BackendArg::Moesaic => Stack::Moesaic,
        }
    }
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    moesaic simulate moesaic-compare/plans/ep16.yaml\n  \
    moesaic simulate plan.yaml --workload chat --concurrency 256 --goodput ttft:1s,tpot:30ms\n  \
    moesaic simulate plan.yaml --rate 20 --requests 2000 --routing zipf:0.6 --trials 10 --output sim")]
pub(crate) struct SimulateArgs {
    /// A plan file.
    #[arg(value_name = "PLAN")]
    pub plan: PathBuf,
    /// The model, where it is not the one that the plan names: preset, model folder or config.json.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub predict: PredictArgs,
    /// So many requests a second at random moments, instead of the workload's arrivals.
    #[arg(long, value_name = "R", conflicts_with = "concurrency", help_heading = "Requests")]
    pub rate: Option<f64>,
    /// So many requests, instead of the workload's number.
    #[arg(long, value_name = "N", help_heading = "Requests")]
    pub requests: Option<usize>,
    /// What users want, as in ttft:1s,tpot:30ms,e2e:20s: goodput counts the requests that meet all of it.
    #[arg(long, value_name = "GOALS", help_heading = "Requests")]
    pub goodput: Option<String>,
    /// Same seed, same simulation [default: the workload's].
    #[arg(long, value_name = "S", help_heading = "Requests")]
    pub seed: Option<u64>,
    /// So many seeds, the first the one above, for intervals.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Requests")]
    pub trials: usize,
    /// Write all figures as JSON ("-" is standard output, instead of the text).
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub json: Option<PathBuf>,
    /// Folder for an HTML page with plots.
    #[arg(short, long, value_name = "DIR", help_heading = "Output")]
    pub output: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    moesaic validate                                           the published rows, each predicted without itself\n  \
    moesaic validate --e2e served.csv --output report          rows of your own, with a page of plots")]
pub(crate) struct ValidateArgs {
    /// Measured ops and collectives (CSV: gpu, op, params, latency_us, framework).
    #[arg(long, value_name = "FILE")]
    pub ops: Option<PathBuf>,
    /// A folder of tables that moesaic profile wrote: how well each row is met by the others.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["ops", "e2e", "json", "output"])]
    pub tables: Option<PathBuf>,
    /// Measured served models (CSV: backend, model_path, system, mode, isl, osl, sizes, silicon_ttft_ms, silicon_tpot_ms).
    #[arg(long, value_name = "FILE")]
    pub e2e: Option<PathBuf>,
    /// Write all rows and errors.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Folder for the same and a page with plots.
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
pub(crate) enum CommunicatorArg {
    /// Ranks are threads of this process.
    #[default]
    InProcess,
    /// Ranks are processes of this machine, over sockets and shared memory.
    Process,
}

#[derive(Args, Clone)]
pub(crate) struct ModelArgs {
    /// Model folder (Hugging Face format), or a preset with --load-format dummy; without one, the small model inside
    /// the binary.
    #[arg(value_name = "MODEL", help_heading = "Model")]
    model: Option<PathBuf>,
    /// The same as MODEL.
    #[arg(long = "model", value_name = "MODEL", conflicts_with = "model", help_heading = "Model")]
    model_flag: Option<PathBuf>,
    /// Where weights come from: the folder's files, or random ones (dummy).
    #[arg(long, value_enum, default_value_t, help_heading = "Model")]
    pub load_format: LoadFormat,
    /// Type of the weights in memory; auto is the checkpoint's own.
    #[arg(long, value_enum, default_value_t, help_heading = "Model")]
    pub dtype: DTypeArg,
    /// Give each expert room for at most this many times its even share of a sequence's tokens; without it, nothing is
    /// dropped, whatever the config says.
    #[arg(long, value_name = "FACTOR", help_heading = "Model")]
    pub moe_expert_capacity_factor: Option<f32>,
    /// Which tokens lose their place at a full expert.
    #[arg(long, value_enum, default_value_t, help_heading = "Model")]
    pub moe_token_drop_policy: DropPolicyArg,
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub(crate) enum DropPolicyArg {
    /// The lowest gate first.
    #[default]
    Probs,
    /// The latest position first.
    Position,
}

impl From<DropPolicyArg> for DropPolicy {
    fn from(arg: DropPolicyArg) -> DropPolicy {
        match arg {
            DropPolicyArg::Probs => DropPolicy::Probs,
            DropPolicyArg::Position => DropPolicy::Position,
        }
    }
}

impl ModelArgs {
    /// The same flags with this model, or the one inside the binary.
    pub(crate) fn with_model(self, model: Option<PathBuf>) -> ModelArgs {
        ModelArgs { model, model_flag: None, ..self }
    }

    /// The arguments that say the same to another process.
    pub(crate) fn to_args(&self) -> Vec<std::ffi::OsString> {
        let name =
            |value: Option<clap::builder::PossibleValue>| value.expect("no value is skipped").get_name().to_string();
        let mut args: Vec<std::ffi::OsString> = vec![
            "--load-format".into(),
            name(self.load_format.to_possible_value()).into(),
            "--dtype".into(),
            name(self.dtype.to_possible_value()).into(),
            "--moe-token-drop-policy".into(),
            name(self.moe_token_drop_policy.to_possible_value()).into(),
        ];
        if let Some(factor) = self.moe_expert_capacity_factor {
            args.extend(["--moe-expert-capacity-factor".into(), factor.to_string().into()]);
        }
        if let Some(model) = self.model() {
            args.extend(["--model".into(), model.into()]);
        }
        args
    }

    /// The model that was named, by position or by flag.
    pub(crate) fn model(&self) -> Option<&PathBuf> {
        self.model.as_ref().or(self.model_flag.as_ref())
    }
}

#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
pub(crate) enum LoadFormat {
    /// Read the checkpoint.
    #[default]
    Auto,
    /// Random weights.
    Dummy,
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub enum DTypeArg {
    /// As stored.
    #[default]
    Auto,
    /// F32.
    #[value(alias = "float", alias = "f32")]
    Float32,
    /// BF16.
    #[value(alias = "bf16")]
    Bfloat16,
}

impl From<DTypeArg> for LoadDType {
    fn from(arg: DTypeArg) -> LoadDType {
        match arg {
            DTypeArg::Auto => LoadDType::Auto,
            DTypeArg::Float32 => LoadDType::Float32,
            DTypeArg::Bfloat16 => LoadDType::BFloat16,
        }
    }
}

#[derive(Args)]
pub(crate) struct EngineArgs {
    /// Longest sequence (prompt and answer), tokens; by default what the requests need.
    #[arg(long, value_name = "N", help_heading = "Engine")]
    pub max_model_len: Option<usize>,
    /// Sequences that run at a time.
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Engine")]
    pub max_num_seqs: usize,
    /// Tokens of one step; longer prompts are cut into chunks.
    #[arg(long, value_name = "N", default_value_t = 2048, help_heading = "Engine")]
    pub max_num_batched_tokens: usize,
    /// Tokens of a KV block.
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "Engine")]
    pub block_size: usize,
    /// Don't share the KV cache of equal prefixes.
    #[arg(long, help_heading = "Engine")]
    pub no_enable_prefix_caching: bool,
    /// Don't cut prompts into chunks.
    #[arg(long, help_heading = "Engine")]
    pub no_enable_chunked_prefill: bool,
    /// Threads; all usable cores by default.
    #[arg(long, value_name = "N", help_heading = "Engine")]
    pub num_threads: Option<usize>,
    /// Share of the available memory that may be used.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, help_heading = "Memory")]
    pub memory_utilization: f64,
    /// Memory that may be used, instead of a share (4GiB, 500MB, bytes).
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, help_heading = "Memory")]
    pub memory_limit: Option<Bytes>,
    /// Size of the KV cache; by default what the sequences need.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, help_heading = "Memory")]
    pub kv_cache_memory_bytes: Option<Bytes>,
}

impl EngineArgs {
    /// The engine's settings; `needed_len` is used where no longest length was asked for.
    pub(crate) fn config(&self, dtype: DTypeArg, needed_len: usize) -> anyhow::Result<EngineConfig> {
        anyhow::ensure!(
            self.memory_utilization > 0.0 && self.memory_utilization <= 1.0,
            "--memory-utilization is {}; a share above 0 and at most 1 is right",
            self.memory_utilization
        );
        for (flag, value, most) in [
            ("--max-num-seqs", Some(self.max_num_seqs), 1 << 16),
            ("--max-num-batched-tokens", Some(self.max_num_batched_tokens), 1 << 20),
            ("--num-threads", self.num_threads, 1024),
        ] {
            let value = value.unwrap_or(1);
            anyhow::ensure!((1..=most).contains(&value), "{flag} is {value}; 1 to {most} is right");
        }
        let block_size = self.block_size;
        anyhow::ensure!(
            (8..=1024).contains(&block_size) && block_size.is_multiple_of(8),
            "--block-size is {block_size}; a multiple of 8 from 8 to 1024 is right"
        );
        Ok(EngineConfig {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: Some(self.max_model_len.unwrap_or(needed_len)),
            block_size: self.block_size,
            enable_prefix_caching: !self.no_enable_prefix_caching,
            enable_chunked_prefill: !self.no_enable_chunked_prefill,
            num_threads: self.num_threads,
            memory_utilization: self.memory_utilization,
            memory_limit: self.memory_limit,
            kv_cache: self.kv_cache_memory_bytes,
            dtype: dtype.into(),
            ..EngineConfig::default()
        })
    }
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    moesaic generate --prompt \"She had always been\" --max-tokens 60\n  \
    echo \"Dear Sir,\" | moesaic generate ./model\n  \
    moesaic generate ./model --chat --prompt \"What is a mosaic?\"\n  \
    moesaic generate --plan moesaic-compare/plans/ep16.yaml    on 16 ranks\n  \
    moesaic generate ./model --prompt-ids 1,2,3 --json --logits logits.safetensors")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to continue; several run together. Without one, standard input is read.
    #[arg(short, long, value_name = "TEXT", help_heading = "Prompt")]
    pub prompt: Vec<String>,
    /// Token ids to continue, instead of text.
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "chat"], help_heading = "Prompt")]
    pub prompt_ids: Vec<u32>,
    /// Use the model's chat template; without --prompt, talk turn by turn.
    #[arg(long, help_heading = "Prompt")]
    pub chat: bool,
    /// System message of the chat.
    #[arg(long, value_name = "TEXT", requires = "chat", help_heading = "Prompt")]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Spread the model over local ranks as this plan file says.
    #[arg(long, value_name = "FILE", help_heading = "Ranks")]
    pub plan: Option<PathBuf>,
    /// What ranks are, and how they reach each other.
    #[arg(long, value_enum, default_value_t, requires = "plan", help_heading = "Ranks")]
    pub communicator: CommunicatorArg,
    /// Longest that a rank waits for another, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, help_heading = "Ranks")]
    pub deadline: f64,
    /// Print one JSON object with token ids and log-probabilities instead of streaming text.
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Write the logits of every prompt position and every step (safetensors).
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub logits: Option<PathBuf>,
    /// No memory table, progress or summary on standard error.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Args)]
pub(crate) struct SamplingArgs {
    /// Tokens to generate at most.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128, help_heading = "Sampling")]
    pub max_tokens: usize,
    /// 0 is greedy; by default as the model's generation_config.json says.
    #[arg(long, value_name = "T", allow_negative_numbers = true, help_heading = "Sampling")]
    pub temperature: Option<f32>,
    /// Draw from the K likeliest tokens; 0 is all.
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    pub top_k: Option<usize>,
    /// Draw from the likeliest tokens that together have this probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true, help_heading = "Sampling")]
    pub top_p: Option<f32>,
    /// Draw from tokens with at least this share of the likeliest one's probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true, help_heading = "Sampling")]
    pub min_p: Option<f32>,
    /// Above 1, tokens of prompt and answer become less likely.
    #[arg(long, value_name = "X", allow_negative_numbers = true, help_heading = "Sampling")]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens that the answer has.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true, help_heading = "Sampling")]
    pub presence_penalty: f32,
    /// Subtracted from a token's logit each time that the answer has it.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true, help_heading = "Sampling")]
    pub frequency_penalty: f32,
    /// Same seed and prompt, same answer, whatever runs beside it.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Sampling")]
    pub seed: u64,
    /// End before this text; may be given several times.
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    pub stop: Vec<String>,
    /// End at these token ids.
    #[arg(long, value_name = "IDS", value_delimiter = ',', help_heading = "Sampling")]
    pub stop_token_ids: Vec<u32>,
    /// Go on beyond the model's end-of-text.
    #[arg(long, help_heading = "Sampling")]
    pub ignore_eos: bool,
    /// Report the N likeliest tokens of each step (with --json).
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    pub logprobs: Option<usize>,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  moesaic inspect qwen3-30b-a3b\n  moesaic inspect ./model --json\n  moesaic inspect --list"
)]
pub(crate) struct InspectArgs {
    /// Preset, model folder or config.json; without one, the small model inside the binary.
    #[arg(value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Context length that attention FLOPs and the KV cache are shown for.
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    pub context: usize,
    /// One JSON object.
    #[arg(long)]
    pub json: bool,
    /// List the presets.
    #[arg(long)]
    pub list: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    moesaic init deepseek-v3 --output ./tiny-v3 --layers 4 --hidden 256 --heads 4 --experts 8 --intermediate 128 --vocab 1024\n  \
    moesaic init --config ./config.json --output ./random --seed 7")]
pub(crate) struct InitArgs {
    /// Preset, model folder or config.json.
    #[arg(value_name = "MODEL", required_unless_present = "config")]
    pub model: Option<PathBuf>,
    /// A config.json, the same as MODEL.
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub config: Option<PathBuf>,
    /// New folder to write.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Same seed, same weights.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Bytes a file.
    #[arg(long, value_name = "BYTES", default_value = "5GB", value_parser = parse_bytes)]
    pub shard_size: Bytes,
    /// Decoder layers.
    #[arg(long, value_name = "N", help_heading = "Scale")]
    pub layers: Option<usize>,
    /// Model width.
    #[arg(long, value_name = "N", help_heading = "Scale")]
    pub hidden: Option<usize>,
    /// Attention heads.
    #[arg(long, value_name = "N", help_heading = "Scale")]
    pub heads: Option<usize>,
    /// Experts a layer.
    #[arg(long, value_name = "N", help_heading = "Scale")]
    pub experts: Option<usize>,
    /// Hidden width of an expert.
    #[arg(long, value_name = "N", help_heading = "Scale")]
    pub intermediate: Option<usize>,
    /// Vocabulary.
    #[arg(long, value_name = "N", help_heading = "Scale")]
    pub vocab: Option<usize>,
}

#[derive(Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub kind: BenchKind,
}

#[derive(Subcommand)]
pub(crate) enum BenchKind {
    /// One batch at a time: time to first token, time per output token, share of the roofline.
    Latency(BenchLatencyArgs),
    /// Many requests at once through the scheduler: requests and tokens per second.
    Throughput(BenchThroughputArgs),
}

#[derive(Args)]
pub(crate) struct BenchCommon {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompt tokens (random ids).
    #[arg(long, value_name = "N", default_value_t = 512, help_heading = "Workload")]
    pub input_len: usize,
    /// Generated tokens.
    #[arg(long, value_name = "N", default_value_t = 128, help_heading = "Workload")]
    pub output_len: usize,
    /// Seed of the prompts.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Workload")]
    pub seed: u64,
    /// Write the result as JSON to FILE ("-" is standard output).
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Args)]
#[command(
    after_help = "Example:\n  moesaic bench latency ./model --batch-size 1,4,16 --input-len 512 --output-len 64 --json result.json"
)]
pub(crate) struct BenchLatencyArgs {
    #[command(flatten)]
    pub common: BenchCommon,
    /// Sequences at a time; several sizes are measured one after the other.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1", help_heading = "Workload")]
    pub batch_size: Vec<usize>,
    /// Measured rounds; one more is run first to warm up.
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Workload")]
    pub num_iters: usize,
    /// Show where the time goes, op by op, beside the least that each op could take.
    #[arg(long, help_heading = "Output")]
    pub by_op: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  moesaic bench throughput ./model --num-prompts 64 --input-len 256 --output-len 64")]
pub(crate) struct BenchThroughputArgs {
    #[command(flatten)]
    pub common: BenchCommon,
    /// Requests, all given at the start.
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Workload")]
    pub num_prompts: usize,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    moesaic profile qwen3-30b-a3b --list                       what would be measured\n  \
    moesaic profile ./model --max-seconds 600                  ten minutes of it; the same command goes on\n  \
    moesaic profile ./model --op gemm,moe --dtype bfloat16     some ops only")]
pub(crate) struct ProfileArgs {
    /// Preset, model folder or config.json; without one, the small model inside the binary.
    #[arg(value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Folder for the tables, one file an op [default: moesaic-profile/MACHINE].
    #[arg(short, long, value_name = "DIR", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Print what is still to be measured, and measure nothing.
    #[arg(long, help_heading = "Output")]
    pub list: bool,
    /// No progress on standard error.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
    /// Some ops only.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(moesaic_planner::profile::TABLES), help_heading = "What")]
    pub op: Vec<String>,
    /// Types of weights [default: all, the model's own first].
    #[arg(long, value_enum, value_name = "TYPES", value_delimiter = ',', help_heading = "What")]
    pub dtype: Vec<ProfileDTypeArg>,
    /// Ranks that share heads and experts; ops of one rank alone are measured, too.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "What")]
    pub tensor_parallel_size: usize,
    /// Ranks that whole experts are spread over.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "What")]
    pub expert_parallel_size: usize,
    /// Most rows of a step.
    #[arg(long, value_name = "N", default_value_t = 2048, help_heading = "What")]
    pub max_num_batched_tokens: u64,
    /// Most sequences of a step.
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "What")]
    pub max_num_seqs: u64,
    /// Longest context, tokens [default: 4096, or the model's own if that is less].
    #[arg(long, value_name = "N", help_heading = "What")]
    pub max_model_len: Option<u64>,
    /// Stop after this time, with what has been measured.
    #[arg(long, value_name = "SECONDS", help_heading = "How")]
    pub max_seconds: Option<f64>,
    /// Threads; all usable cores by default.
    #[arg(long, value_name = "N", help_heading = "How")]
    pub num_threads: Option<usize>,
    /// Memory that a measurement may take, at most four fifths of what is available (4GiB, 500MB, bytes).
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, help_heading = "How")]
    pub memory_limit: Option<Bytes>,
}

/// Types that kernels have.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum ProfileDTypeArg {
    /// F32.
    #[value(alias = "float", alias = "f32")]
    Float32,
    /// BF16.
    #[value(alias = "bf16")]
    Bfloat16,
    /// F8 E4M3 with factors for blocks of 128.
    #[value(alias = "fp8_block")]
    Fp8,
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// One JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `30ms`, `1.5s`, `250us`: a time above 0, in seconds.
fn parse_seconds(text: &str) -> Result<f64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "s" => 1.0,
        "ms" => 1e-3,
        "us" | "µs" => 1e-6,
        "" => return Err(format!("'{text}' has no unit; {text}ms or {text}s would be a time")),
        unit => return Err(format!("'{unit}' is not a unit of time; us, ms and s are")),
    };
    let seconds = number.parse::<f64>().ok().map(|number| number * factor);
    seconds
        .filter(|&seconds| seconds > 0.0)
        .ok_or_else(|| format!("'{text}' is not a time above 0; 30ms or 1.5s would be"))
}

/// `32` or `32..96`.
fn parse_gpus(text: &str) -> Result<(usize, usize), String> {
    let wrong = || format!("'{text}' is not a number of GPUs; 32 or 32..96 would be");
    let number = |text: &str| text.trim().parse::<usize>().ok().filter(|&gpus| gpus > 0).ok_or_else(wrong);
    let (from, to) = match text.split_once("..") {
        None => (number(text)?, number(text)?),
        Some((from, to)) => (number(from)?, number(to)?),
    };
    if from > to {
        return Err(format!("'{text}' ends before it begins; {to}..{from} would be right"));
    }
    Ok((from, to))
}

/// `4GiB`, `500MB`, `1024`: a number with a decimal or binary unit.
fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1048576.0,
        "gib" => 1073741824.0,
        "tib" => 1099511627776.0,
        _ => return Err(format!("'{unit}' is not a unit; B, KB, MB, GB, TB, KiB, MiB, GiB and TiB are")),
    };
    let number: f64 = number.parse().map_err(|_| format!("'{text}' is not a size; 4GiB or 500MB would be"))?;
    Ok(Bytes((number * factor) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_seconds("30ms"), Ok(0.03));
        assert_eq!(parse_seconds("1.5 s"), Ok(1.5));
        assert_eq!(parse_seconds("30"), Err("'30' has no unit; 30ms or 30s would be a time".to_owned()));
        for wrong in ["0s", "-1s", "ms", "3 fortnights", "1e3s", ""] {
            assert!(parse_seconds(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_gpus("32..96"), Ok((32, 96)));
        assert_eq!(parse_gpus("8"), Ok((8, 8)));
        for wrong in ["0", "96..32", "a", "8..", "1..2..3"] {
            assert!(parse_gpus(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_bytes("4GiB"), Ok(Bytes(4 << 30)));
        assert_eq!(parse_bytes("1.5 kb"), Ok(Bytes(1500)));
        assert_eq!(parse_bytes("17"), Ok(Bytes(17)));
        assert!(parse_bytes("4 parsecs").is_err());
        assert!(parse_bytes("-1").is_err());
    }
}
