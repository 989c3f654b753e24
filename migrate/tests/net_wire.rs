//! An agent, spoken to frame by frame: what a holder refuses, and what a seal does.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::time::Duration;

use migrate::agent::Agent;
use migrate::registry::RegistryAddr;
use migrate::transport::{Client, Link, greet};
use migrate::wire::{
    Call, End, Fenced, Held, Message, NameCall, Offer, Open, Position, Purpose, RefuseReason, Reject, Reply,
    SealCall,
};
use net_common::*;
use segment::{Generation, SegmentName, SegmentReader};

struct Raw(Link<migrate::transport::Stream>);

impl Raw {
    async fn connect(agent: &Agent) -> Self {
        let mut link = Link::new(tester().dial(agent.address()).await.unwrap().0, "agent");
        let welcome = greet(&mut link, Purpose::Ship, "", "test").await.unwrap();
        assert_eq!(welcome.node, "a");
        Self(link)
    }

    async fn send(&mut self, stream: u32, message: Message) {
        self.0.writer.send(stream, &message).await.unwrap();
    }

    /// The next frame that is not a sign of life.
    async fn next(&mut self) -> Message {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.0.reader.next())
                .await
                .unwrap()
                .unwrap();
            if !matches!(next.message, Message::Ping(_)) {
                return next.message;
            }
        }
    }

    async fn open(&mut self, generation: u64) -> Message {
        let open = Open {
            vm: vm("web"),
            generation: Generation(generation),
            owner: "o".into(),
            lease_ttl_ms: None,
        };
        self.send(0, Message::Open(open)).await;
        self.next().await
    }

    async fn opened(agent: &Agent, generation: u64) -> Self {
        let mut raw = Self::connect(agent).await;
        assert!(matches!(raw.open(generation).await, Message::Position(_)));
        raw
    }

    async fn offer(&mut self, stream: u32, generation: u64, sent: &Sent) -> Message {
        let offer = Offer {
            generation: Generation(generation),
            ..sent.offer.clone()
        };
        self.send(stream, Message::Offer(offer)).await;
        self.next().await
    }

    async fn content(&mut self, stream: u32, bytes: &[u8]) -> Message {
        self.send(stream, Message::Chunk(bytes.to_vec())).await;
        self.send(stream, Message::End(End {})).await;
        self.next().await
    }
}

/// A segment and its offer.
struct Sent {
    bytes: Vec<u8>,
    offer: Offer,
}

fn sent(name: &SegmentName, parent: Option<&SegmentName>, salt: u8) -> Sent {
    let checkpoint = checkpoint_of(name, salt);
    let of = parent.map(|p| (p, checkpoint_of(p, 1)));
    let bytes = segment_bytes(name, checkpoint, of, 8);
    let digest = SegmentReader::open(&bytes[..]).unwrap().digest();
    let parent = of.map(|(name, checkpoint)| Held {
        name: name.clone(),
        checkpoint,
    });
    let offer = Offer {
        generation: name.generation,
        name: name.clone(),
        checkpoint,
        digest,
        bytes: bytes.len() as u64,
        parent,
        created_unix_ns: 1,
    };
    Sent { bytes, offer }
}

fn refused(message: &Message) -> RefuseReason {
    match message {
        Message::Refuse(refuse) => refuse.reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_acknowledges_only_whole_chains_of_whole_segments() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let mut raw = Raw::opened(&agent, 1).await;
    let (one, two, three) = (name("web", 1, 1), name("web", 1, 2), name("web", 1, 3));
    let (first, second, third) = (
        sent(&one, None, 1),
        sent(&two, Some(&one), 1),
        sent(&three, Some(&two), 1),
    );

    // On nothing; and the connection goes on.
    assert_eq!(
        refused(&raw.offer(1, 1, &second).await),
        RefuseReason::MissingParent
    );
    raw.send(1, Message::End(End {})).await;

    // Damaged in the middle: not taken, and nothing of it is left.
    assert!(matches!(raw.offer(2, 1, &first).await, Message::Accept(_)));
    let mut damaged = first.bytes.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    assert_eq!(refused(&raw.content(2, &damaged).await), RefuseReason::Invalid);
    assert!(agent.store().all().is_empty());
    assert_eq!(agent.store().used_bytes(), 0);
    assert!(
        std::fs::read_dir(agent.store().dir().join("tmp"))
            .unwrap()
            .next()
            .is_none()
    );

    assert!(matches!(raw.offer(3, 1, &first).await, Message::Accept(_)));
    let Message::Stored(ack) = raw.content(3, &first.bytes).await else {
        panic!("not stored")
    };
    assert_eq!(
        (ack.held(), ack.digest(), ack.generation()),
        (&first.offer.held(), first.offer.digest, Generation(1))
    );
    assert!(matches!(raw.offer(4, 1, &second).await, Message::Accept(_)));
    assert!(matches!(raw.content(4, &second.bytes).await, Message::Stored(_)));

    // Again: it is there. Another checkpoint of that name: never.
    assert!(matches!(raw.offer(5, 1, &second).await, Message::Have(_)));
    raw.send(5, Message::End(End {})).await;
    assert_eq!(
        refused(&raw.offer(6, 1, &sent(&two, Some(&one), 9)).await),
        RefuseReason::DuplicateName
    );
    raw.send(6, Message::End(End {})).await;

    // A link is taken away below it: what stands on it is not acknowledged, though it is there.
    agent.store().remove(&one).unwrap();
    assert!(matches!(raw.offer(7, 1, &third).await, Message::Accept(_)));
    assert_eq!(
        refused(&raw.content(7, &third.bytes).await),
        RefuseReason::MissingParent
    );
    let mut again = Raw::connect(&agent).await;
    let Message::Position(Position { newest, .. }) = again.open(1).await else {
        panic!("no position")
    };
    assert_eq!(newest, None);
    assert_eq!(
        refused(&again.offer(1, 1, &second).await),
        RefuseReason::MissingParent
    );
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_what_was_offered_is_not_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let mut raw = Raw::opened(&agent, 1).await;
    let one = name("web", 1, 1);
    let (offered, comes) = (sent(&one, None, 1), sent(&one, None, 2));
    assert_eq!(offered.bytes.len(), comes.bytes.len());
    assert!(matches!(raw.offer(1, 1, &offered).await, Message::Accept(_)));
    assert_eq!(
        refused(&raw.content(1, &comes.bytes).await),
        RefuseReason::Invalid
    );
    // Another name than was offered.
    let (two, other) = (name("web", 1, 2), name("web", 1, 3));
    assert!(matches!(
        raw.offer(2, 1, &sent(&two, None, 1)).await,
        Message::Accept(_)
    ));
    assert_eq!(
        refused(&raw.content(2, &sent(&other, None, 1).bytes).await),
        RefuseReason::Invalid
    );
    assert!(agent.store().get(&two).is_none() && agent.store().get(&other).is_none());
    agent.stop().await;
}

async fn seal(agent: &str, generation: u64) -> Result<Reply, migrate::transport::CallError> {
    let mut client = Client::connect(agent, &tester()).await.unwrap();
    let call = SealCall {
        vm: vm("web"),
        generation: Generation(generation),
    };
    client.call(Call::Seal(call), Duration::from_secs(5)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seal_ends_an_owner_in_the_middle_of_a_segment_and_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let address = agent.address().to_owned();
    let mut raw = Raw::opened(&agent, 1).await;
    let (one, two) = (name("web", 1, 1), name("web", 1, 2));
    let (first, second) = (sent(&one, None, 1), sent(&two, Some(&one), 1));
    assert!(matches!(raw.offer(1, 1, &first).await, Message::Accept(_)));
    assert!(matches!(raw.content(1, &first.bytes).await, Message::Stored(_)));
    assert!(matches!(raw.offer(2, 1, &second).await, Message::Accept(_)));
    raw.send(2, Message::Chunk(second.bytes[..100].to_vec())).await;

    let Ok(Reply::Sealed(report)) = seal(&address, 2).await else {
        panic!("not sealed")
    };
    assert_eq!(report.generation, Generation(2));
    assert_eq!(report.newest.unwrap().name, one);
    let fenced = Fenced {
        vm: vm("web"),
        asked: Generation(1),
        current: Generation(2),
    };
    assert_eq!(raw.next().await, Message::Fenced(fenced.clone()));
    eventually("the rest of it is gone", || {
        std::fs::read_dir(agent.store().dir().join("tmp"))
            .unwrap()
            .next()
            .is_none()
    })
    .await;
    assert!(agent.store().get(&two).is_none());

    agent.stop().await;
    let agent = Agent::start(again(dir.path(), "a", RegistryAddr::Embedded, &address))
        .await
        .unwrap();
    assert_eq!(Raw::connect(&agent).await.open(1).await, Message::Fenced(fenced));
    // Neither an older candidate; but the same one again.
    assert!(
        seal(&address, 1)
            .await
            .unwrap_err()
            .to_string()
            .contains("promised generation 2")
    );
    assert!(matches!(seal(&address, 2).await, Ok(Reply::Sealed(_))));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_connection_of_the_owner_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let mut old = Raw::opened(&agent, 1).await;
    let mut new = Raw::opened(&agent, 1).await;
    assert!(matches!(
        old.next().await,
        Message::Reject(Reject {
            code: Reject::SUPERSEDED,
            ..
        })
    ));
    let first = sent(&name("web", 1, 1), None, 1);
    assert!(matches!(new.offer(1, 1, &first).await, Message::Accept(_)));
    assert!(matches!(new.content(1, &first.bytes).await, Message::Stored(_)));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_out_of_order_are_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let mut raw = Raw::connect(&agent).await;
    raw.send(1, Message::End(End {})).await;
    let Message::Reject(reject) = raw.next().await else {
        panic!("not refused")
    };
    assert_eq!(
        (reject.code, reject.why.contains("End")),
        (Reject::PROTOCOL, true)
    );

    // A call on a connection that ships, and a chunk on one for calls.
    let mut raw = Raw::connect(&agent).await;
    raw.send(
        1,
        Message::Call(Box::new(Call::Show(NameCall {
            name: name("web", 1, 1),
        }))),
    )
    .await;
    assert!(matches!(raw.next().await, Message::Reject(_)));
    let mut link = Link::new(tester().dial(agent.address()).await.unwrap().0, "agent");
    greet(&mut link, Purpose::Call, "", "test").await.unwrap();
    let mut raw = Raw(link);
    raw.send(1, Message::Chunk(vec![1])).await;
    assert!(matches!(
        raw.next().await,
        Message::Reject(Reject {
            code: Reject::PROTOCOL,
            ..
        })
    ));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let mut open = Vec::new();
    let refused = loop {
        assert!(
            open.len() <= migrate::agent::MAX_CONNECTIONS,
            "they are not bounded"
        );
        match Client::connect(agent.address(), &tester()).await {
            Ok(client) => open.push(client),
            Err(error) => break error,
        }
    };
    assert!(
        refused.to_string().contains("connections are open here"),
        "{refused}"
    );
    open.clear();
    // Room again.
    let start = tokio::time::Instant::now();
    while Client::connect(agent.address(), &tester()).await.is_err() {
        assert!(start.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    agent.stop().await;
}
