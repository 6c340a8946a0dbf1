//! A machine's network while it runs: the link, what has come over it, and whom to wake.

use super::receiver::{Bell, Receiver};
use super::{Link, NetError, Network};

/// Brings the world back that sleeps until something happens, or the vCPU that runs.
pub trait Waker: Clone + Send + 'static {
    /// Frames are there that were not.
    fn frames_came(&self);
    /// They have waited for a while: the vCPU is to come back, if it runs.
    fn kick(&self);
    /// The link is lost, and this was seen of it.
    fn link_lost(&self, seen: String);
}

/// A network and its state.
#[derive(Debug)]
pub struct Attached {
    network: Network,
    /// In this order: the receiver's thread must not see the link end.
    up: Option<(Receiver, Link)>,
}

impl Attached {
    /// Lets frames come in over `link`.
    pub fn new(link: Link, waker: &impl Waker) -> Result<Attached, NetError> {
        let mut attached = Attached {
            network: link.network.clone(),
            up: None,
        };
        attached.listen(link, waker)?;
        Ok(attached)
    }

    fn listen(&mut self, link: Link, waker: &impl Waker) -> Result<(), NetError> {
        let [came, overdue, lost] = [(); 3].map(|()| waker.clone());
        let receiver = link.listen(Bell {
            frames: Box::new(move || came.frames_came()),
            overdue: Box::new(move || overdue.kick()),
            lost: Box::new(move |seen| lost.link_lost(seen)),
        })?;
        self.up = Some((receiver, link));
        Ok(())
    }

    /// Takes the link down, until another machine is on it.
    pub fn take_down(&mut self) {
        self.up = None;
    }

    /// The same network again, from its beginning.
    pub fn put_up(&mut self, waker: &impl Waker) -> Result<(), NetError> {
        self.take_down();
        self.listen(Link::open(self.network.clone())?, waker)
    }

    /// Whether a frame waits.
    pub fn waits(&self) -> bool {
        let up = self.up.as_ref();
        up.is_some_and(|(receiver, _)| !receiver.inbox().is_empty())
    }

    /// The next frame that has come.
    pub fn receive(&self) -> Option<Vec<u8>> {
        self.up.as_ref()?.0.inbox().pop()
    }

    /// Sends a frame, or drops it.
    pub fn send(&mut self, frame: &[u8]) {
        if let Some((_, link)) = &mut self.up {
            link.send(frame);
        }
    }

    /// The link is lost: why, in words, where `seen` is what was seen of it.
    pub fn post_mortem(&mut self, seen: &str) -> String {
        match &mut self.up {
            Some((_, link)) => link.post_mortem(seen),
            None => seen.into(),
        }
    }
}
