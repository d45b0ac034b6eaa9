//! Makes one image of the matrix by its program, with the installed programs, with `blk`, or with both in turns, and hands it
//! to the judge. All that was run is kept as text, for whoever has to look into a failure.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    judge,
    model::{Disk, Patterns, World},
    options::{DataFile, Encryption, Maker},
    plan::Image,
    program::{Generator, Step},
};

/// The longest that a program may run.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whose programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Qemu,
    Blk,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Qemu, Self::Blk];
}

/// What a program said.
#[derive(Debug)]
pub struct Said {
    pub status: i32,
    pub out: String,
    pub err: String,
}

/// What all images need.
pub struct Shop {
    pub patterns: Patterns,
    /// Where the patterns are, as files.
    pub pattern_files: PathBuf,
}

/// One image in the making.
pub struct Bench<'a> {
    shop: &'a Shop,
    pub image: Image,
    pub dir: PathBuf,
    /// The commands that were run, with what they had on standard input.
    pub history: String,
    pub counts: BTreeMap<&'static str, usize>,
    /// What the image has to be, once it is made.
    pub world: Option<World>,
}

impl<'a> Bench<'a> {
    pub fn new(shop: &'a Shop, image: Image, dir: &Path) -> Self {
        std::os::unix::fs::symlink(&shop.pattern_files, dir.join("p")).unwrap();
        Self {
            shop,
            image,
            dir: dir.to_owned(),
            history: String::new(),
            counts: BTreeMap::new(),
            world: None,
        }
    }

    /// The words that open the image.
    pub fn opening(&self) -> Vec<String> {
        let text = match self.image.options.encryption() {
            Encryption::None => "-f qcow2 disk.qcow2",
            Encryption::Luks | Encryption::Aes => {
                "--object secret,id=key,data=sesame --image-opts \
                 driver=qcow2,encrypt.key-secret=key,file.filename=disk.qcow2"
            }
        };
        text.split(' ').map(str::to_owned).collect()
    }

    /// Runs one program to its end.
    pub fn run(
        &mut self,
        side: Side,
        tool: &str,
        args: &[String],
        input: &str,
    ) -> Result<Said, String> {
        let shown = args.join(" ");
        let who = match side {
            Side::Qemu => tool.to_owned(),
            Side::Blk => format!("blk as {tool}"),
        };
        let _ = writeln!(self.history, "{who} {shown}");
        for line in input.lines() {
            let _ = writeln!(self.history, "    {line}");
        }
        let program = match side {
            Side::Qemu => tool,
            Side::Blk => env!("CARGO_BIN_EXE_blk"),
        };
        // Files, so that nobody waits for anybody.
        let file = |name: &str| self.dir.join(name);
        fs::write(file("in"), input).map_err(text)?;
        let stdin = fs::File::open(file("in")).map_err(text)?;
        let create = |name: &str| fs::File::create(file(name)).map_err(text);
        let mut child = Command::new(program)
            .arg0(tool)
            .args(args)
            .current_dir(&self.dir)
            .stdin(stdin)
            .stdout(Stdio::from(create("out")?))
            .stderr(Stdio::from(create("err")?))
            .spawn()
            .map_err(text)?;
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().map_err(text)? {
                break status;
            }
            if begun.elapsed() > PATIENCE {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{who} {shown}: still running after {PATIENCE:?}"));
            }
            thread::sleep(Duration::from_millis(1));
        };
        let read = |name: &str| {
            fs::read(file(name))
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .map_err(text)
        };
        let said = Said {
            status: status.code().unwrap_or(-1),
            out: read("out")?,
            err: read("err")?,
        };
        if said.status != 0 {
            let _ = writeln!(self.history, "  => {}", said.status);
        }
        Ok(said)
    }

    /// Runs one command that has to succeed.
    pub fn succeed(&mut self, side: Side, tool: &str, args: &[String]) -> Result<Said, String> {
        let said = self.run(side, tool, args, "")?;
        if said.status == 0 {
            Ok(said)
        } else {
            Err(format!("{side:?}: {tool} {}: {said:?}", args.join(" ")))
        }
    }

    /// The lines of one session of qemu-io, of which none may fail.
    fn session(&mut self, side: Side, cache: &str, lines: &[String]) -> Result<(), String> {
        let mut args = words(&format!("-d unmap -t {cache}"));
        let opening = self.opening();
        // Without it ours refuses compressed data, which encrypted images store as it is.
        let consent = "driver=qcow2,encrypt.compressed-plaintext=on,";
        args.extend(opening.into_iter().map(|word| match side {
            Side::Blk => word.replace("driver=qcow2,", consent),
            Side::Qemu => word,
        }));
        let mut input = lines.join("\n");
        input.push('\n');
        let said = self.run(side, "qemu-io", &args, &input)?;
        let complaints = said.out.replace("qemu-io> ", "");
        if said.status != 0 || !complaints.trim().is_empty() || !said.err.is_empty() {
            return Err(format!(
                "{side:?}: a session failed: {complaints}{}",
                said.err
            ));
        }
        Ok(())
    }

    fn create(&mut self, side: Side, size: u64) -> Result<(), String> {
        let options = self.image.options.for_create();
        let secret = match self.image.options.encryption() {
            Encryption::None => "",
            _ => "--object secret,id=key,data=sesame ",
        };
        let line = format!("create -q {secret}-f qcow2 -o {options} disk.qcow2 {size}");
        self.succeed(side, "qemu-img", &words(&line)).map(drop)
    }

    /// A command on the image.
    pub fn image_command(&mut self, side: Side, command: &str, rest: &str) -> Result<Said, String> {
        let mut args = words(command);
        args.extend(self.opening());
        args.extend(words(rest));
        self.run(side, "qemu-img", &args, "")
    }

    /// Makes the image and has it judged, on the way and at the end.
    pub fn make(&mut self) -> Result<(), String> {
        let options = self.image.options;
        let mut generator = Generator::new(options, self.image.seed);
        let mut world = World {
            disk: Disk::new(generator.initial_size(), options.cluster_size()),
            snapshots: Vec::new(),
        };
        // It takes qemu-img two seconds to find out how slow this machine is.
        let is_slow = options.encryption() == Encryption::Luks && options.maker() == Maker::Mixed;
        let side = if is_slow && !generator.coin(4) {
            Side::Blk
        } else {
            choose(options.maker(), &mut generator)
        };
        self.create(side, generator.initial_size())?;
        let mut side = choose(options.maker(), &mut generator);
        let mut lines: Vec<String> = Vec::new();
        // qemu-io goes on to fill the cluster that it has put compressed data in last, even if that was freed and belongs to
        // somebody else since: two writes, one of them compressed, and other data is gone. It forgets when it ends.
        let (mut packs, mut stale) = (false, false);
        loop {
            let by_qemu = side == Side::Qemu;
            let compress = Generator::can_compress(options) && !(by_qemu && stale);
            let step = generator.next(&world, compress);
            let kinds = step.iter().flat_map(|step| step.kinds(&world));
            for kind in kinds {
                *self.counts.entry(kind).or_default() += 1;
            }
            if let Some(more) = step.as_ref().and_then(Step::lines) {
                lines.extend(more);
                let is_compressed = matches!(step, Some(Step::Compressed { .. }));
                packs |= is_compressed;
                stale |= packs && !is_compressed;
            } else if !lines.is_empty() {
                let cache = ["writeback", "unsafe"][usize::from(generator.coin(2))];
                self.session(side, cache, &std::mem::take(&mut lines))?;
                (packs, stale) = (false, false);
                side = choose(options.maker(), &mut generator);
            }
            let Some(step) = step else { break };
            let mut done = true;
            if step.lines().is_none() {
                done = self.outside(&step, side, &generator, &world)?;
                side = choose(options.maker(), &mut generator);
            }
            if done {
                step.apply(&self.shop.patterns, &mut world);
            }
        }
        judge::everything(self, &world)?;
        self.world = Some(world);
        Ok(())
    }

    /// A step of a command of its own. Gives whether it was done: narrow refcounts refuse some.
    fn outside(
        &mut self,
        step: &Step,
        side: Side,
        generator: &Generator,
        world: &World,
    ) -> Result<bool, String> {
        let (command, rest) = match step {
            Step::SnapshotCreate { name } => (format!("snapshot -c {name}"), String::new()),
            Step::SnapshotApply { name } => (format!("snapshot -a {name}"), String::new()),
            Step::SnapshotDelete { name } => (format!("snapshot -d {name}"), String::new()),
            Step::Resize { size } => ("resize -q --shrink".to_owned(), size.to_string()),
            Step::Audit => {
                judge::clean(self)?;
                return judge::disk(self, &world.disk).map(|()| true);
            }
            _ => return Ok(true),
        };
        let said = self.image_command(side, &command, &rest)?;
        if said.status == 0 {
            return Ok(true);
        }
        if !generator.may_be_refused(step) {
            return Err(format!("{side:?}: {command}: {said:?}"));
        }
        *self.counts.entry("refused").or_default() += 1;
        // What qemu-img refuses it has half done, and leaves the rest as leaks. We leave nothing.
        if side == Side::Qemu {
            let fixed = self.image_command(Side::Qemu, "check -q -r leaks", "")?;
            if fixed.status != 0 {
                return Err(format!("leaks after {command}: {fixed:?}"));
            }
        }
        judge::clean(self)?;
        Ok(false)
    }

    /// The data file, where it has to be the disk as the guest sees it.
    pub fn raw_data_file(&self) -> Option<PathBuf> {
        let options = self.image.options;
        let is_raw =
            options.data_file() == DataFile::Raw && options.encryption() == Encryption::None;
        is_raw.then(|| self.dir.join("data.raw"))
    }
}

fn choose(maker: Maker, generator: &mut Generator) -> Side {
    match maker {
        Maker::Qemu => Side::Qemu,
        Maker::Blk => Side::Blk,
        Maker::Mixed if generator.coin(2) => Side::Qemu,
        Maker::Mixed => Side::Blk,
    }
}

pub fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}
