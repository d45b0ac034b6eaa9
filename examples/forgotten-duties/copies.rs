// What each copy forgets. This file is read by the build script, which makes the copies, and by the tests, which say what has
// to come of it. An edit replaces a text that occurs in the file; if it doesn't any more, the build fails and says so.

/// A copy of the example driver.
pub struct Copy {
    /// The name of the module with the copy.
    pub module: &'static str,
    /// The duty that it forgets, in the words of the suite.
    pub duty: Option<&'static str>,
    /// File, what stands there, and what the copy has instead.
    pub edits: &'static [(&'static str, &'static str, &'static str)],
}

/// All of them. The first one forgets nothing.
pub const COPIES: &[Copy] = &[
    Copy {
        module: "forgets_nothing",
        duty: None,
        edits: &[],
    },
    Copy {
        module: "never_pins",
        duty: Some("pin a cluster while I/O to it is in flight"),
        edits: &[
            ("image.rs", "let pin = self.pins.pin();", "let pin = ();"),
            ("driver.rs", "let pin = self.pins.pin();", "let pin = ();"),
            ("driver.rs", "pin: Some(pin),", "pin: None,"),
        ],
    },
    Copy {
        module: "frees_in_spite_of_pins",
        duty: Some("pin a cluster while I/O to it is in flight"),
        edits: &[(
            "write_back.rs",
            "self.pins.observe(&mut freed.grace)",
            "self.pins.observe(&mut freed.grace) || true",
        )],
    },
    Copy {
        module: "frees_before_it_has_punched",
        duty: Some("end a cluster's punch before the cluster is used again"),
        edits: &[(
            "write_back.rs",
            "        let _ = request.file()?.discard(place, self.cluster_size).await;
        self.state.write().space.free(freed.host);",
            "        self.state.write().space.free(freed.host);
        let _ = request.file()?.discard(place, self.cluster_size).await;",
        )],
    },
    Copy {
        module: "links_before_it_writes",
        duty: Some("make data durable before a link to it"),
        edits: &[
            (
                "image.rs",
                "let filled = self.write_new(",
                "self.link(piece.cluster, host)?; let filled = self.write_new(",
            ),
            ("image.rs", "Ok(()) => self.link(piece.cluster, host),", "Ok(()) => Ok(()),"),
        ],
    },
    Copy {
        module: "writes_links_before_owners",
        duty: Some("make a cluster's owner durable before a link to it"),
        edits: &[
            (
                "write_back.rs",
                "for block in &ledger {",
                "file.flush().await?; for block in &first {",
            ),
            ("write_back.rs", "for block in &map {", "for block in &ledger {"),
            ("write_back.rs", "for block in &first {", "for block in &map {"),
        ],
    },
    Copy {
        module: "has_no_first_barrier",
        duty: Some("make data durable before a link to it"),
        edits: &[(
            "write_back.rs",
            "            // Barrier: data and owners are durable before anything refers to them.
            file.flush().await?;",
            "",
        )],
    },
    Copy {
        module: "reuses_what_is_linked_on_disk",
        duty: Some("make an unlink durable before the cluster is used again"),
        edits: &[(
            "image.rs",
            "                state.space.unlinked.push(Freed { host, grace });",
            "                let mut grace = grace;
                if self.pins.observe(&mut grace) {
                    state.space.free(host);
                } else {
                    state.space.unlinked.push(Freed { host, grace });
                }",
        )],
    },
    Copy {
        module: "keeps_its_children",
        duty: Some("take children from the request and never keep them"),
        edits: &[
            (
                "driver.rs",
                "pub(crate) read_only: AtomicBool,",
                "pub(crate) read_only: AtomicBool, pub(crate) kept: std::sync::OnceLock<Request>,",
            ),
            (
                "image.rs",
                "read_only: AtomicBool::new(read_only),",
                "read_only: AtomicBool::new(read_only), kept: std::sync::OnceLock::new(),",
            ),
            (
                "image.rs",
                "request.read_backing(start, buf)",
                "self.kept.get_or_init(|| request.clone()).read_backing(start, buf)",
            ),
        ],
    },
    Copy {
        module: "lets_the_backing_file_come_back",
        duty: Some("make discarded ranges read as declared"),
        edits: &[(
            "image.rs",
            "state.map.set(piece.cluster.0, Entry::Zero.encode());",
            "state.map.set(piece.cluster.0, Entry::Unallocated.encode());",
        )],
    },
    Copy {
        module: "only_says_that_it_discards",
        duty: Some("make discarded ranges read as declared"),
        edits: &[(
            "driver.rs",
            "async fn discard(self: Arc<Self>, _request: Request, offset: u64, len: u64) -> Result<()> {
        self.zero_clusters(offset, len)",
            "async fn discard(self: Arc<Self>, _request: Request, _offset: u64, _len: u64) -> Result<()> {
        Ok(())",
        )],
    },
    Copy {
        module: "fills_nothing_in",
        duty: Some("fill a new cluster with what the guest saw around the write"),
        edits: &[("image.rs", "if old == Entry::Unallocated {", "if false {")],
    },
    Copy {
        module: "claims_nothing",
        duty: Some("claim a cluster while it is being allocated"),
        edits: &[(
            "claims.rs",
            "claimed.get_mut(&cluster)",
            "claimed.get_mut(&cluster).filter(|_| false)",
        )],
    },
    Copy {
        module: "only_says_that_it_flushes",
        duty: Some("make everything durable in flush that completed before it"),
        edits: &[(
            "driver.rs",
            "async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        self.write_back(&request).await",
            "async fn flush(self: Arc<Self>, _request: Request) -> Result<()> {
        Ok(())",
        )],
    },
];
