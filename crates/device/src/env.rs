//! The environment variables that change what the program does. No other file of the program reads one, so this list is
//! complete.

use crate::DeviceError;

/// A variable and what it does.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What setting it changes.
    pub effect: &'static str,
}

const fn variable(name: &'static str, effect: &'static str) -> Variable {
    Variable { name, effect }
}

/// All of them: ours first, then those of libraries and conventions that we follow.
pub const VARIABLES: [Variable; 11] = [
    variable("MOESAIC_ISA", "instruction set of the kernels, at most what the CPU has"),
    variable("MOESAIC_NUM_THREADS", "threads of a rank, the main one included"),
    variable("HF_HOME", "folder of the Hugging Face cache"),
    variable("HF_HUB_CACHE", "folder of downloaded models, instead of HF_HOME/hub"),
    variable("HF_HUB_OFFLINE", "1: never ask the network for a model"),
    variable("RUST_LOG", "which log lines are printed"),
    variable("NO_COLOR", "set: no colours"),
    variable("CUDA_VISIBLE_DEVICES", "which GPUs CUDA shows, in which order"),
    variable("LD_LIBRARY_PATH", "where CUDA and NCCL are looked for first"),
    variable("NCCL_DEBUG", "what NCCL prints"),
    variable("NCCL_SOCKET_IFNAME", "network interfaces that NCCL uses"),
];

/// The value of one of [`VARIABLES`], if it is set and not empty.
pub fn value(name: &'static str) -> Option<String> {
    assert!(VARIABLES.iter().any(|variable| variable.name == name), "{name} is missing from the list of variables");
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()).filter(|value| !value.is_empty())
}

/// The folder list that programs are looked for in.
pub(crate) fn program_folders() -> Vec<std::path::PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

/// `MOESAIC_NUM_THREADS`: a number from 1 to 4096.
pub fn num_threads() -> Result<Option<usize>, DeviceError> {
    value("MOESAIC_NUM_THREADS").map(parse_num_threads).transpose()
}

fn parse_num_threads(value: String) -> Result<usize, DeviceError> {
    let number = value.parse().ok().filter(|n| (1..=4096).contains(n));
    number.ok_or(DeviceError::Variable {
        variable: "MOESAIC_NUM_THREADS",
        value,
        expected: "a number of threads, 1 to 4096",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_threads_is_checked() {
        assert_eq!(parse_num_threads("12".into()).unwrap(), 12);
        for wrong in ["0", "-1", "two", "4097", "99999999999999999999"] {
            let error = parse_num_threads(wrong.into()).unwrap_err().to_string();
            assert_eq!(error, format!("MOESAIC_NUM_THREADS={wrong}: expected a number of threads, 1 to 4096"));
        }
    }

    #[test]
    #[should_panic(expected = "missing from the list")]
    fn a_variable_outside_the_list_is_our_mistake() {
        value("MOESAIC_UNHEARD_OF");
    }
}
