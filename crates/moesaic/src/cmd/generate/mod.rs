//! `moesaic generate`: continue a prompt, or chat.

mod answer;
mod launcher;
mod logits;

use std::io::{BufRead, IsTerminal, Read, Write, stderr, stdin, stdout};

use anyhow::{Context, Result, ensure};
use moesaic_engine::{Engine, Request, SamplingParams};
use moesaic_spec::GenerationConfig;
use moesaic_text::{ChatMessage, ChatRequest, Tokenizer};

use self::answer::{Answer, Summary};
use self::launcher::Launcher;
use crate::args::{CommunicatorArg, GenerateArgs, SamplingArgs};
use crate::cmd::adapted;
use crate::folder::OpenModel;
use crate::plans;

/// Tokens of context that a chat without `--max-model-len` may grow to.
const CHAT_MODEL_LEN: usize = 4096;
/// What `moesaic generate` alone goes on from.
const DEFAULT_PROMPT: &str = "It was a fine morning, and";
/// More standard input than any context holds.
const MAX_STDIN_BYTES: u64 = 64 << 20;

pub(crate) fn run(args: &GenerateArgs) -> Result<()> {
    ensure!(args.sampling.max_tokens > 0, "--max-tokens is 0; 1 or more is right");
    let (file, model_args) = match &args.plan {
        None => (None, args.model.clone()),
        Some(path) => {
            let file = plans::read(path)?;
            let model = plans::model_of(&file, &args.model).with_context(|| path.display().to_string())?;
            (Some(file), model)
        }
    };
    let model = match &args.plan {
        None => OpenModel::open(&model_args)?,
        Some(path) => OpenModel::open(&model_args).with_context(|| path.display().to_string())?,
    };
    let interactive = args.chat && args.prompt.is_empty() && stdin().is_terminal();
    let launcher = Launcher::new(args, &model, model_args, file)?;
    if interactive {
        return chat(args, &model, &launcher);
    }
    let texts = texts(args)?;
    let prompts =
        if args.prompt_ids.is_empty() { encode(args, &model, &texts)? } else { vec![args.prompt_ids.clone()] };
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let limit = model.spec.max_position_embeddings;
    ensure!(
        longest < limit,
        "the prompt has {longest} tokens; at most {} fit into the model's context of {limit} with one token of answer",
        limit - 1
    );
    let mut config = args.engine.config(args.model.dtype, (longest + args.sampling.max_tokens).min(limit))?;
    config.max_num_seqs = config.max_num_seqs.min(prompts.len());
    config.keep_logits = args.logits.is_some();
    ensure!(args.logits.is_none() || prompts.len() == 1, "--logits is for one prompt; {} were given", prompts.len());
    let mut engine = launcher.launch(config)?;
    if !args.quiet {
        eprintln!("model     {}\n{}{}", model.name, launcher.line(), engine.ledger());
        if texts.first().is_some_and(|text| text == DEFAULT_PROMPT) {
            eprintln!("prompt    {DEFAULT_PROMPT}");
        }
        eprintln!();
    }
    let mut session = Session { args, model: &model, engine: &mut engine };
    let answers = session.answer(&prompts, !args.json && prompts.len() == 1)?;
    if args.json {
        let answers: Vec<_> = answers.iter().map(Answer::to_json).collect();
        let json = if let [one] = answers.as_slice() { one.clone() } else { serde_json::json!(answers) };
        writeln!(stdout(), "{json:#}")?;
    } else if answers.len() > 1 {
        for (answer, prompt) in answers.iter().zip(&args.prompt) {
            writeln!(stdout(), "{prompt}{}\n", answer.text)?;
        }
    }
    if let Some(file) = &args.logits {
        logits::write(file, session.engine, &answers[0])?;
    }
    Ok(())
}

/// The prompts as given; none when they were given as ids.
fn texts(args: &GenerateArgs) -> Result<Vec<String>> {
    match (args.prompt_ids.is_empty(), args.prompt.is_empty()) {
        (false, _) => Ok(Vec::new()),
        (true, false) => Ok(args.prompt.clone()),
        (true, true) => Ok(vec![stdin_prompt()?]),
    }
}

/// The prompts as token ids.
fn encode(args: &GenerateArgs, model: &OpenModel, texts: &[String]) -> Result<Vec<Vec<u32>>> {
    let tokenizer = model.tokenizer()?;
    let mut prompts = Vec::new();
    for text in texts {
        let ids = match args.chat {
            true => {
                let mut messages = system_message(args);
                messages.push(ChatMessage::new("user", text.clone()));
                chat_ids(tokenizer, &messages)?
            }
            false => tokenizer.encode(text, true)?,
        };
        ensure!(!ids.is_empty(), "the prompt is empty; give --prompt TEXT, --prompt-ids IDS or text on standard input");
        prompts.push(ids);
    }
    Ok(prompts)
}

fn stdin_prompt() -> Result<String> {
    // Nobody typed a prompt: the model begins with one of ours.
    if stdin().is_terminal() {
        return Ok(DEFAULT_PROMPT.to_string());
    }
    let mut text = String::new();
    stdin().lock().take(MAX_STDIN_BYTES).read_to_string(&mut text).context("standard input is not UTF-8 text")?;
    let text = text.trim_end_matches(['\n', '\r']);
    Ok(if text.is_empty() { DEFAULT_PROMPT.to_string() } else { text.to_string() })
}

fn system_message(args: &GenerateArgs) -> Vec<ChatMessage> {
    args.system.iter().map(|text| ChatMessage::new("system", text.clone())).collect()
}

fn chat_ids(tokenizer: &Tokenizer, messages: &[ChatMessage]) -> Result<Vec<u32>> {
    let text = tokenizer.chat_template(false)?.render(ChatRequest::new(messages))?;
    Ok(tokenizer.encode(&text, false)?)
}

/// Turn by turn until end of input; the prefix cache keeps what was said.
fn chat(args: &GenerateArgs, model: &OpenModel, launcher: &Launcher) -> Result<()> {
    let tokenizer = model.tokenizer()?;
    let limit = model.spec.max_position_embeddings;
    let mut config = args.engine.config(args.model.dtype, CHAT_MODEL_LEN.min(limit))?;
    config.max_num_seqs = 1;
    let mut engine = launcher.launch(config)?;
    if !args.quiet {
        eprintln!("model     {}\n{}{}\n\nEnd with Ctrl-D.", model.name, launcher.line(), engine.ledger());
    }
    let mut messages = system_message(args);
    loop {
        write!(stderr(), "> ")?;
        let mut line = String::new();
        if stdin().lock().read_line(&mut line)? == 0 {
            return Ok(());
        }
        messages.push(ChatMessage::new("user", line.trim_end().to_string()));
        let ids = chat_ids(tokenizer, &messages)?;
        let mut session = Session { args, model, engine: &mut engine };
        match session.answer(&[ids], true) {
            Ok(mut answers) => messages.push(ChatMessage::new("assistant", answers.remove(0).text)),
            // The conversation no longer fits, say; the user may start another.
            Err(error) => {
                eprintln!("error: {error:#}");
                messages.pop();
            }
        }
    }
}

/// One engine answering prompts.
struct Session<'a> {
    args: &'a GenerateArgs,
    model: &'a OpenModel,
    engine: &'a mut Engine,
}

impl Session<'_> {
    /// Runs the prompts to their ends, together; with `stream`, text appears as it comes.
    fn answer(&mut self, prompts: &[Vec<u32>], stream: bool) -> Result<Vec<Answer>> {
        let sampling = &self.args.sampling;
        let mut stop_token_ids = sampling.stop_token_ids.clone();
        if !sampling.ignore_eos {
            stop_token_ids.extend(&self.model.generation.eos_token_ids);
        }
        let mut summary = Summary::start(prompts, self.args.communicator == CommunicatorArg::Process);
        let mut answers = Vec::new();
        for prompt in prompts {
            let id = self.engine.add(Request {
                prompt: prompt.clone(),
                sampling: sampling_params(sampling, &self.model.generation),
                max_tokens: sampling.max_tokens,
                stop_token_ids: stop_token_ids.clone(),
            })?;
            answers.push(Answer::new(id, prompt, self.model.tokenizer.as_ref(), &stop_token_ids, &sampling.stop)?);
        }
        while !self.engine.is_idle() {
            let step = self.engine.step()?;
            summary.step(&step);
            for event in step.events {
                let answer = answers.iter_mut().find(|answer| answer.id == event.id).expect("an event of an answer");
                let text = answer.push(event)?;
                if stream {
                    write!(stdout(), "{text}")?;
                    stdout().flush()?;
                }
                if answer.stopped_by_text() {
                    self.engine.abort(answer.id);
                }
            }
        }
        if stream {
            writeln!(stdout())?;
        }
        if !self.args.quiet {
            eprintln!("\n{summary}");
            adapted::sentences(self.engine.adaptation()).iter().for_each(|sentence| eprintln!("{sentence}"));
        }
        Ok(answers)
    }
}

/// Flags first, then the model's own defaults; a model that does not ask for sampling is greedy.
fn sampling_params(args: &SamplingArgs, generation: &GenerationConfig) -> SamplingParams {
    let default_temperature = match generation.do_sample {
        Some(true) => generation.temperature.unwrap_or(1.0),
        Some(false) => 0.0,
        None => generation.temperature.unwrap_or(0.0),
    };
    SamplingParams {
        temperature: args.temperature.unwrap_or(default_temperature),
        top_k: args.top_k.or(generation.top_k).unwrap_or(0),
        top_p: args.top_p.or(generation.top_p).unwrap_or(1.0),
        min_p: args.min_p.or(generation.min_p).unwrap_or(0.0),
        repetition_penalty: args.repetition_penalty.or(generation.repetition_penalty).unwrap_or(1.0),
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        seed: args.seed,
        logprobs: args.logprobs,
        ..SamplingParams::default()
    }
}
