//! `standby serve --config FILE`: the same options in a file. A key is called as the option is, without the dashes; what
//! is on the command line wins.
//!
//! ```text
//! argv --(--data may be missing)--> which file --> each key an option of `serve`? --> argv + what argv does not say --> Cli
//! ```

use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};
use toml::de::{DeTable, DeValue};

use super::Cli;

/// The longest file.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Options that a file cannot have: those about the command line itself.
const NOT_IN_A_FILE: [&str; 4] = ["agent", "config", "help", "version"];
const SERVE: &str = "serve";

/// Why a file does not say how to run an agent.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ConfigError {
    /// It cannot be read.
    #[error("the configuration {} cannot be read: {why}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Something in it is wrong.
    #[error("{}:{line}: {why}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// What.
        why: String,
    },
}

impl Cli {
    /// What the process was started with, and what the file says that it names; ends the process, with a message, when
    /// that is no command.
    #[must_use]
    pub fn from_process() -> Self {
        let argv: Vec<OsString> = std::env::args_os().collect();
        let argv = match with_file(&argv) {
            Ok(argv) => argv,
            Err(error) => {
                eprintln!("error: {error}");
                std::process::exit(2);
            }
        };
        let matches = Self::command().get_matches_from(argv);
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// The command, but for what a file may say instead.
fn relaxed() -> Command {
    Cli::command().mut_subcommand(SERVE, |serve| serve.mut_arg("data", |data| data.required(false)))
}

/// The command line with what is in the file that it names.
fn with_file(argv: &[OsString]) -> Result<Vec<OsString>, ConfigError> {
    // What is wrong with the command line is said when it is read in full.
    let Ok(matches) = relaxed().try_get_matches_from(argv) else {
        return Ok(argv.to_vec());
    };
    let serve = matches.subcommand_matches(SERVE);
    let Some((serve, path)) = serve.and_then(|serve| Some((serve, serve.get_one::<PathBuf>("config")?)))
    else {
        return Ok(argv.to_vec());
    };
    let text = crate::regular::read_text(path, MAX_CONFIG_BYTES).map_err(|e| ConfigError::Read {
        path: path.clone(),
        why: e.to_string(),
    })?;
    let mut argv = argv.to_vec();
    argv.extend(options(path, &text, serve, &argv)?);
    Ok(argv)
}

/// Which line a place of a text is in, from 1.
fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = text.get(..span.start).unwrap_or(text);
    before.bytes().filter(|byte| *byte == b'\n').count() + 1
}

/// What the file says and the command line does not, as options.
fn options(
    path: &Path,
    text: &str,
    given: &ArgMatches,
    argv: &[OsString],
) -> Result<Vec<OsString>, ConfigError> {
    let at = |span: &Range<usize>, why: String| ConfigError::Line {
        path: path.to_owned(),
        line: line_of(text, span),
        why,
    };
    let table =
        DeTable::parse(text).map_err(|e| at(&e.span().unwrap_or_default(), e.message().to_owned()))?;
    let mut command = relaxed();
    // So that the options which every command has are those of this one too.
    command.build();
    let mut found = Vec::new();
    for (key, value) in table.get_ref() {
        let name: &str = key.get_ref();
        let arg = argument(&command, name).ok_or_else(|| {
            at(
                &key.span(),
                format!("{name:?} is no option of `standby serve`, whose --help lists them"),
            )
        })?;
        let values =
            values(arg, value.get_ref()).map_err(|why| at(&value.span(), format!("{name}: {why}")))?;
        let one: Vec<OsString> = values
            .into_iter()
            .map(|value| match value {
                Some(value) => format!("--{name}={value}").into(),
                None => format!("--{name}").into(),
            })
            .collect();
        // Looked at also when the command line says otherwise: a file is right or wrong by itself.
        let alone = [argv.first().cloned().unwrap_or_default(), SERVE.into()];
        let checked = relaxed().try_get_matches_from(alone.into_iter().chain(one.clone()));
        if let Err(error) = checked
            && error.kind() != ErrorKind::MissingRequiredArgument
        {
            let said = error.to_string();
            let said = said
                .lines()
                .next()
                .unwrap_or_default()
                .trim_start_matches("error: ");
            return Err(at(&value.span(), format!("{name}: {said}")));
        }
        if given.value_source(arg.get_id().as_str()) != Some(ValueSource::CommandLine) {
            found.extend(one);
        }
    }
    Ok(found)
}

fn argument<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    let serve = command.find_subcommand(SERVE)?;
    let named = |arg: &&Arg| arg.get_long() == Some(name) && !NOT_IN_A_FILE.contains(&name);
    serve.get_arguments().find(named)
}

/// The values of an option as the command line would have them; none of a switch.
fn values(arg: &Arg, value: &DeValue<'_>) -> Result<Vec<Option<String>>, String> {
    let switch = matches!(arg.get_action(), ArgAction::SetTrue);
    let many = matches!(arg.get_action(), ArgAction::Append);
    let one = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Ok(Some(text.to_string())),
        DeValue::Integer(number) => Ok(Some(number.to_string())),
        DeValue::Float(number) => Ok(Some(number.to_string())),
        DeValue::Boolean(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => Err(format!(
            "a {} cannot stand here: write a text or a number",
            value.type_str()
        )),
    };
    match value {
        DeValue::Boolean(true) if switch => Ok(vec![None]),
        DeValue::Boolean(false) if switch => Ok(Vec::new()),
        _ if switch => Err("it is true or false".into()),
        DeValue::Array(items) if many => items.iter().map(|item| one(item.get_ref())).collect(),
        value => Ok(vec![one(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, more: &[&str]) -> Result<Vec<String>, ConfigError> {
        let argv: Vec<OsString> = ["standby", "serve", "--config", "f"]
            .iter()
            .chain(more)
            .map(OsString::from)
            .collect();
        let matches = relaxed().try_get_matches_from(&argv).unwrap();
        let found = options(
            Path::new("f"),
            text,
            matches.subcommand_matches(SERVE).unwrap(),
            &argv,
        )?;
        // All of it together is a command.
        let all: Vec<_> = argv.iter().cloned().chain(found.clone()).collect();
        relaxed().try_get_matches_from(all).unwrap();
        Ok(found
            .into_iter()
            .map(|option| option.into_string().unwrap())
            .collect())
    }

    #[test]
    fn keys_are_options_and_the_command_line_wins() {
        let text = "listen = \"10.0.0.1:7400\"\ndata = '/srv/data'\nroles = ['store']\nlabel = ['zone=a', 'rack=1']\nreplace = true\n\
                    max-links = 100\nglobal = 's3://pool/a'\nglobal-every = '30s'\nmetrics = '127.0.0.1:7410'\ntls = '/etc/tls'\n";
        let mut found = read(text, &[]).unwrap();
        found.sort();
        assert_eq!(
            found,
            [
                "--data=/srv/data",
                "--global-every=30s",
                "--global=s3://pool/a",
                "--label=rack=1",
                "--label=zone=a",
                "--listen=10.0.0.1:7400",
                "--max-links=100",
                "--metrics=127.0.0.1:7410",
                "--replace",
                "--roles=store",
                "--tls=/etc/tls",
            ]
        );
        let found = read(
            text,
            &["--listen", "127.0.0.1:1", "--label", "zone=b", "--replace"],
        )
        .unwrap();
        assert!(
            !found
                .iter()
                .any(|option| option.starts_with("--l") || option == "--replace"),
            "{found:?}"
        );
        assert_eq!(read("replace = false\n", &[]), Ok(Vec::new()));
        assert_eq!(read("", &[]), Ok(Vec::new()));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, line, word) in [
            (
                "listen = '127.0.0.1:1'\n\nliston = 'x'\n",
                3,
                "\"liston\" is no option",
            ),
            ("agent = 'x'\n", 1, "\"agent\" is no option"),
            ("config = 'x'\n", 1, "\"config\" is no option"),
            ("# a\nglobal = 'pool'\n", 2, "global: "),
            ("global-every = 30\n", 1, "global-every: "),
            ("replace = 'yes'\n", 1, "true or false"),
            ("listen = ['a', 'b']\n", 1, "array"),
            ("[etcd]\nca = 'x'\n", 1, "\"etcd\" is no option"),
            ("label = [1979-05-27]\n", 1, "datetime"),
            ("listen = \n", 1, ""),
            ("listen = 'a'\nlisten = 'b'\n", 2, ""),
        ] {
            match read(text, &[]) {
                Err(ConfigError::Line { line: at, why, .. }) => {
                    assert_eq!(at, line, "{text}: {why}");
                    assert!(why.contains(word), "{text}: {why}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
