use tokio::io::{AsyncWriteExt, duplex};

use super::*;
use crate::wire::Ping;

fn me() -> Identity {
    Identity::plaintext("me")
}

#[test]
fn versions_one_step_apart_agree() {
    assert_eq!(agree((1, 1), (1, 1)), Some(1));
    assert_eq!(agree((1, 2), (2, 3)), Some(2));
    assert_eq!(agree((2, 3), (1, 2)), Some(2));
    assert_eq!(agree((1, 1), (2, 3)), None);
    assert_eq!(agree((3, 4), (1, 2)), None);
}

#[tokio::test]
async fn only_loopback_is_spoken_to_in_plain() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:7400"] {
        let refused = me().listen(address).await.unwrap_err();
        assert!(
            matches!(refused, TransportError::NotLoopback { .. }),
            "{address}: {refused}"
        );
        assert!(refused.to_string().contains("Use a certificate"));
        assert!(matches!(
            me().dial(address).await,
            Err(TransportError::NotLoopback { .. })
        ));
    }
    assert!(matches!(
        me().listen("127.0.0.1").await,
        Err(TransportError::Address { .. })
    ));
    assert!(me().listen("127.0.0.1:0").await.is_ok());
}

#[tokio::test]
async fn a_port_in_use_says_so() {
    let first = me().listen("127.0.0.1:0").await.unwrap();
    let address = first.local_addr().unwrap().to_string();
    let second = me().listen(&address).await.unwrap_err();
    let told = second.in_full();
    assert!(
        told.contains(&address) && told.contains("in use") && told.contains("--listen"),
        "{told}"
    );
}

async fn pair() -> (Link<tokio::io::DuplexStream>, Link<tokio::io::DuplexStream>) {
    let (a, b) = duplex(64 << 10);
    (Link::new(a, "listener"), Link::new(b, "caller"))
}

fn welcome() -> Message {
    Message::Welcome(Welcome {
        version: 1,
        node: "n".into(),
        registry: None,
        software: "s".into(),
    })
}

#[tokio::test]
async fn both_sides_greet() {
    let (mut caller, mut listener) = pair().await;
    let listening = tokio::spawn(async move {
        let (hello, version) = expect_hello(&mut listener, "").await.unwrap();
        assert_eq!(
            (hello.purpose, hello.name.as_str(), version),
            (Purpose::Ship, "me", MAX_VERSION)
        );
        listener.writer.send(0, &welcome()).await.unwrap();
    });
    let welcome = greet(&mut caller, Purpose::Ship, "", "me").await.unwrap();
    assert_eq!(welcome.node, "n");
    listening.await.unwrap();
}

#[tokio::test]
async fn another_cluster_or_version_is_told_why() {
    let (mut caller, mut listener) = pair().await;
    let listening = tokio::spawn(async move { expect_hello(&mut listener, "mine").await });
    let refused = greet(&mut caller, Purpose::Call, "theirs", "me")
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("\"mine\""), "{refused}");
    assert!(listening.await.unwrap().is_err());

    let (mut caller, mut listener) = pair().await;
    let listening = tokio::spawn(async move { expect_hello(&mut listener, "").await });
    let (min_version, max_version) = (MAX_VERSION + 1, MAX_VERSION + 2);
    let hello = Hello {
        min_version,
        max_version,
        cluster: "".into(),
        purpose: Purpose::Call,
        name: "x".into(),
    };
    caller.writer.send(0, &Message::Hello(hello)).await.unwrap();
    let answer = caller.reader.next().await.unwrap().message;
    assert!(
        matches!(
            answer,
            Message::Reject(Reject {
                code: Reject::VERSION,
                ..
            })
        ),
        "{answer:?}"
    );
    assert!(matches!(
        listening.await.unwrap(),
        Err(TransportError::Version { .. })
    ));
}

#[tokio::test]
async fn who_does_not_greet_is_refused() {
    let (mut caller, mut listener) = pair().await;
    let listening = tokio::spawn(async move { expect_hello(&mut listener, "").await });
    caller.writer.send(0, &Message::Ping(Ping {})).await.unwrap();
    assert!(matches!(
        caller.reader.next().await.unwrap().message,
        Message::Reject(_)
    ));
    assert!(matches!(
        listening.await.unwrap(),
        Err(TransportError::Unexpected { got: "Ping", .. })
    ));

    // A browser, say.
    let (mut raw, listener) = duplex(1024);
    let mut link = Link::new(listener, "caller");
    raw.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let refused = expect_hello(&mut link, "").await.unwrap_err();
    assert!(
        in_full(&refused).contains("does not speak this protocol"),
        "{refused}"
    );
}

#[tokio::test(start_paused = true)]
async fn silence_ends_the_greeting() {
    let (_caller, mut listener) = pair().await;
    assert!(matches!(
        expect_hello(&mut listener, "").await,
        Err(TransportError::Timeout { .. })
    ));
    let (mut caller, _listener) = pair().await;
    assert!(matches!(
        greet(&mut caller, Purpose::Call, "", "me").await,
        Err(TransportError::Timeout { .. })
    ));
}

#[tokio::test]
async fn a_frame_cut_by_the_end_is_an_error() {
    let (mut raw, listener) = duplex(1024);
    let mut link = Link::new(listener, "caller");
    let mut frame = Vec::new();
    crate::wire::encode_frame(3, &Message::Chunk(vec![7; 100]), &mut frame).unwrap();
    raw.write_all(&frame).await.unwrap();
    raw.write_all(&frame[..frame.len() - 1]).await.unwrap();
    drop(raw);
    let first = link.reader.next().await.unwrap();
    assert_eq!((first.stream, first.message), (3, Message::Chunk(vec![7; 100])));
    assert!(matches!(
        link.reader.next().await,
        Err(TransportError::Closed { .. })
    ));
}
