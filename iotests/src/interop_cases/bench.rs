//! A directory that stands for the simulated disks: images are carried between the two, tools run on the real files.

use std::{path::PathBuf, sync::Arc};

use block_core::{BlockHandle, Node, Options};

use crate::{
    case::{Failure, Scene, Verdict},
    external::{self, Said, TempDir},
    parts::{self, ToolImage},
    stack::{content, same, writer},
    storage::{Content, Disk},
};

/// Where images are for the tools.
pub(super) struct Bench {
    pub scene: Arc<Scene>,
    dir: TempDir,
}

impl Bench {
    /// A bench, if the tools are there and know the format.
    pub fn new(scene: &Arc<Scene>) -> Result<Result<Self, Verdict>, Failure> {
        let dir = TempDir::new().map_err(|error| Failure(error.to_string()))?;
        let bench = Self {
            scene: scene.clone(),
            dir,
        };
        for tool in ["qemu-img", "qemu-io"] {
            let said = external::run(tool, &["--version"], "");
            if said.map_err(|error| Failure(error.to_string()))?.is_none() {
                let why = format!("{tool} isn't installed");
                return Ok(Err(Verdict::NotCovered(why)));
            }
        }
        let probe = bench.img(&["create", "-f", bench.format(), &bench.path("known"), "1M"])?;
        if probe.status != Some(0) {
            let why = "the installed qemu-img doesn't know the format";
            return Ok(Err(Verdict::NotCovered(why.into())));
        }
        Ok(Ok(bench))
    }

    /// The format's name.
    pub fn format(&self) -> &str {
        &self.scene.format.name
    }

    /// The real file of a disk.
    pub fn path(&self, name: &str) -> String {
        self.file(name).to_string_lossy().into_owned()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `qemu-img`.
    pub fn img(&self, arguments: &[&str]) -> Result<Said, Failure> {
        external::run_in(self.dir.path(), "qemu-img", arguments)
            .map_err(|error| Failure(error.to_string()))?
            .ok_or_else(|| Failure("qemu-img has gone".into()))
    }

    /// Runs `qemu-img`, which has to succeed.
    pub fn img_ok(&self, arguments: &[&str]) -> Result<String, Failure> {
        let said = self.img(arguments)?;
        if said.status != Some(0) {
            let what = arguments.join(" ");
            return Err(format!("qemu-img {what}: {}", said.text).into());
        }
        Ok(said.text)
    }

    /// Has `qemu-img` make an image with these options of creation, and with the data file and the key that images of the
    /// format under test have; a disk is made of it as well. `more` are further arguments.
    pub fn create(
        &self,
        name: &str,
        options: &str,
        more: &[&str],
        size: Option<&str>,
    ) -> Result<Said, Failure> {
        let wanted = parts::alone(&self.scene.format.create);
        let own = self.scene.lab.create_options(self.format(), name, &wanted);
        let secret = parts::secret();
        let mut all = parts::text(&own);
        if !all.is_empty() && !options.is_empty() {
            all.push(',');
        }
        all.push_str(options);
        let path = self.path(name);
        let mut arguments = vec!["create", "-f", self.format()];
        arguments.extend(secret.iter().map(String::as_str));
        if !all.is_empty() {
            arguments.extend(["-o", &all]);
        }
        arguments.extend(more);
        arguments.push(&path);
        arguments.extend(size);
        let said = self.img(&arguments)?;
        if said.status == Some(0) {
            self.import(name)?;
        }
        Ok(said)
    }

    /// How the tools are told of an image.
    fn image(&self, name: &str) -> ToolImage {
        let lab = &self.scene.lab;
        lab.tool_image(self.format(), name, self.dir.path(), false)
    }

    /// Runs a command of `qemu-img` on an image.
    pub fn img_on(&self, name: &str, command: &[&str]) -> Result<Said, Failure> {
        self.img(&self.image(name).arguments(command))
    }

    /// Runs a command of `qemu-img` on an image, which has to succeed.
    pub fn img_on_ok(&self, name: &str, command: &[&str]) -> Result<String, Failure> {
        self.img_ok(&self.image(name).arguments(command))
    }

    /// Has `qemu-img` take an internal snapshot (`-c`) or apply one (`-a`).
    pub fn snapshot(&self, name: &str, what: &str, snapshot: &str) -> Result<Said, Failure> {
        let image = self.image(name);
        self.img(&image.without_format(&["snapshot", what, snapshot]))
    }

    /// Has `qemu-img` give an image another size.
    pub fn resize(&self, name: &str, size: &str) -> Result<Said, Failure> {
        let image = self.image(name);
        let mut arguments = image.arguments(&["resize"]);
        arguments.push(size);
        self.img(&arguments)
    }

    /// What `qemu-img info` says of an image, as JSON. It doesn't open what is below.
    pub fn info(&self, name: &str) -> Result<String, Failure> {
        let lab = &self.scene.lab;
        let image = lab.tool_image(self.format(), name, self.dir.path(), true);
        self.img_ok(&image.arguments(&["info", "--output=json"]))
    }

    /// Runs commands of `qemu-io` on an image; all have to succeed.
    pub fn io(&self, name: &str, commands: &[&str]) -> Result<String, Failure> {
        let image = self.image(name);
        let mut arguments = Vec::new();
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.extend(image.options());
        let said = external::run_in(self.dir.path(), "qemu-io", &arguments)
            .map_err(|error| Failure(error.to_string()))?
            .ok_or_else(|| Failure("qemu-io has gone".into()))?;
        let failed = said.text.contains("failed") || said.text.contains("error");
        if said.status != Some(0) || failed {
            return Err(format!("qemu-io {commands:?}: {}", said.text).into());
        }
        Ok(said.text)
    }

    /// Makes a simulated disk of a real file.
    pub fn import(&self, name: &str) -> Result<Arc<Disk>, Failure> {
        let bytes = std::fs::read(self.file(name)).map_err(|error| Failure(error.to_string()))?;
        let mut content = Content::from_bytes(&bytes);
        if let Some(data) = self.scene.lab.data_file(name)
            && let Ok(bytes) = std::fs::read(self.file(&data))
        {
            content = content.with_beside(&Content::from_bytes(&bytes));
        }
        let disk = Disk::new(name, content);
        self.scene.lab.disks.insert(disk.clone());
        Ok(disk)
    }

    /// Makes a real file of a simulated disk.
    pub fn export(&self, name: &str) -> Result<(), Failure> {
        let lab = &self.scene.lab;
        for (name, content) in lab.files_of(name, &lab.disk(name)?.content()) {
            std::fs::write(self.file(&name), content.to_bytes())
                .map_err(|error| Failure(error.to_string()))?;
        }
        Ok(())
    }

    /// What qemu-img reads from an image and all below it.
    pub fn seen_by_qemu(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let (image, to) = (self.image(name), self.path("seen.raw"));
        let mut arguments = image.arguments(&["convert", "-O", "raw"]);
        arguments.push(&to);
        self.img_ok(&arguments)?;
        std::fs::read(self.file("seen.raw")).map_err(|error| Failure(error.to_string()))
    }

    /// qemu-img's check, if it has one for the format.
    pub fn check(&self, name: &str) -> Result<(), Failure> {
        let said = self.img_on(name, &["check"])?;
        match said.status {
            Some(0 | 63) => Ok(()),
            _ => Err(format!("qemu-img check: {}", said.text).into()),
        }
    }

    /// Whether an image says that it wasn't closed, and that its refcounts may be stale.
    pub fn is_dirty(&self, name: &str) -> Result<bool, Failure> {
        let text = self.info(name)?;
        let json: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| Failure(format!("{error}: {text}")))?;
        Ok(json["dirty-flag"].as_bool().unwrap_or(false))
    }

    /// qemu-img's check of an image that nobody has closed: after its repair, if it says that it needs one.
    pub fn check_unclosed(&self, name: &str) -> Result<(), Failure> {
        if self.is_dirty(name)? {
            self.img_on_ok(name, &["check", "-r", "all"])?;
        }
        self.check(name)
    }

    /// Opens a disk here.
    pub async fn open(&self, name: &str) -> Result<(Arc<Node>, Arc<BlockHandle>), Failure> {
        let lab = &self.scene.lab;
        let node = lab.open(self.format(), name, None, &Options::new()).await?;
        let handle = writer(&lab.graph, &node, "guest")?;
        Ok((node, handle))
    }

    /// Closes it.
    pub async fn close(&self, node: Arc<Node>, handle: Arc<BlockHandle>) -> Result<(), Failure> {
        handle.flush().await?;
        drop(handle);
        crate::stack::check(&self.scene.lab.graph, &node, true).await?;
        self.scene.lab.graph.release(&node).await?;
        Ok(())
    }

    /// Opens, reads and closes a disk here.
    pub async fn seen_by_us(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let (node, handle) = self.open(name).await?;
        let bytes = content(&self.scene.lab.graph, &node).await?;
        self.close(node, handle).await?;
        Ok(bytes)
    }

    /// Both see the same in the same bytes.
    pub async fn agree(&self, name: &str, what: &str) -> Result<Vec<u8>, Failure> {
        let theirs = self.seen_by_qemu(name)?;
        let ours = self.seen_by_us(name).await?;
        same(&ours, &theirs, what)?;
        Ok(ours)
    }

    /// The options of creation of the format under test, as `-o` has them.
    pub fn create_options(&self) -> String {
        parts::text(&self.scene.format.create)
    }
}
