//! `blk dd`: copies a part of an image, counted in blocks, into a new one. The copying is `convert`'s: zeroes become holes.

use std::sync::Arc;

use super::{
    Command,
    args::{self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT},
    convert::{self, Engine, Plan, Request, Settings, Source, Target},
};
use crate::common::{
    cache::CacheMode,
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access},
    output::complain,
    progress::Meter,
    session::Session,
    size::{MAX_SIZE, parse_number},
};

pub const COMMAND: Command = Command {
    name: "dd",
    about: "Copy a part of an image, counted in blocks, into a new image",
    usage: "[-f FMT | --image-opts] [-O FMT] [-U] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=FILE of=TARGET",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        Opt::value(
            'O',
            "output-format",
            "FMT",
            "format of TARGET (default: raw)",
        ),
        FORCE_SHARE,
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// The largest block, in bytes.
const MAX_BLOCK: u64 = i32::MAX as u64;

/// What the operands say.
struct Operands<'a> {
    input: &'a str,
    output: &'a str,
    /// Bytes.
    block: u64,
    /// Blocks; `None` for all that there are.
    count: Option<u64>,
    /// Blocks.
    skip: u64,
}

impl<'a> Operands<'a> {
    /// Of an operand that is given twice the last one holds.
    fn read(words: &'a [String]) -> Result<Self, Failure> {
        let (mut input, mut output) = (None, None);
        let (mut block, mut count, mut skip) = (512, None, 0);
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "if" => input = Some(value),
                "of" => output = Some(value),
                "bs" => block = parse_number("bs", value, 1, MAX_BLOCK)?,
                "count" => count = Some(blocks("count", value)?),
                "skip" => skip = blocks("skip", value)?,
                _ => return Err(Failure::new(format!("unrecognized operand {name}"))),
            }
        }
        let (Some(input), Some(output)) = (input, output) else {
            return Err(Failure::new("Must specify both input and output files"));
        };
        Ok(Self {
            input,
            output,
            block,
            count,
            skip,
        })
    }
}

/// A number of blocks, which takes no suffix.
fn blocks(name: &str, text: &str) -> Result<u64, Failure> {
    if text.ends_with(|end: char| end.is_ascii_alphabetic()) && !text.starts_with("0x") {
        return Err(Failure::new(format!("Invalid {name} specified: '{text}'.")));
    }
    parse_number(name, text, 0, MAX_SIZE)
}

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let operands = Operands::read(&parsed.free)?;
    let image = args::image(parsed, operands.input, "format")?;
    let request = Request {
        name: operands.output,
        format: parsed.get("output-format").unwrap_or("raw"),
        list: None,
        image_opts: false,
        exists: false,
        is_zero: false,
        backing: None,
        backing_format: None,
        compress: false,
        bitmaps: false,
        cache: CacheMode::UNSAFE,
        failure: "error while creating output image",
    };
    let access = Access {
        force_share: parsed.has("force-share"),
        ..Access::default()
    };
    let source = Arc::new(open::open(session, image, access).await?);
    request.check(session, 1)?;
    let (offset, length) = part(&operands, source.length());
    let target = Target::prepare(session, &request, length.unwrap_or(0)).await?;
    let Some(length) = length else {
        let program = session.program.name();
        complain!(
            "{program}: {}: cannot skip to specified offset",
            operands.input
        );
        convert::close(vec![source], Arc::new(target)).await?;
        return Ok(0);
    };
    let meter = Meter::new(false, 1.0);
    session.signals.show(&meter);
    let plan = Plan::new(
        vec![Source::part(source.clone(), offset, length)],
        false,
        true,
        1,
    );
    let target = Arc::new(target);
    Engine::new(plan, target.clone(), Settings::plain(session), meter)
        .run(session)
        .await?;
    convert::close(vec![source], target).await?;
    Ok(0)
}

/// Offset and length, in bytes, of what is copied of an image of `length` bytes; no length when the offset is behind the end. As with
/// qemu-img 10, and unlike `dd`, the blocks that are skipped count: `skip=3 count=5` copies two.
fn part(operands: &Operands<'_>, length: u64) -> (u64, Option<u64>) {
    let wanted = operands
        .count
        .map_or(u64::MAX, |count| count.saturating_mul(operands.block));
    let offset = operands.skip.saturating_mul(operands.block);
    (offset, length.min(wanted).checked_sub(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part_of(words: &[&str], length: u64) -> (u64, Option<u64>) {
        let mut words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        words.extend(["if=a".to_owned(), "of=b".to_owned()]);
        part(&Operands::read(&words).ok().unwrap(), length)
    }

    #[test]
    fn the_part_ends_where_the_image_ends() {
        assert_eq!(part_of(&[], 10_240), (0, Some(10_240)));
        assert_eq!(part_of(&["bs=1000", "count=3"], 10_240), (0, Some(3000)));
        assert_eq!(part_of(&["bs=1000", "skip=3"], 10_240), (3000, Some(7240)));
        assert_eq!(
            part_of(&["bs=1000", "skip=3", "count=5"], 10_240),
            (3000, Some(2000))
        );
        assert_eq!(part_of(&["bs=1k", "skip=10"], 10_240), (10_240, Some(0)));
        assert_eq!(part_of(&["bs=1k", "skip=99"], 10_240).1, None);
        let most = "9223372036854775807";
        let (skip, count) = (format!("skip={most}"), format!("count={most}"));
        assert_eq!(part_of(&["bs=2147483647", &skip], 10_240).1, None);
        assert_eq!(
            part_of(&["bs=2147483647", &count], 10_240),
            (0, Some(10_240))
        );
    }
}
