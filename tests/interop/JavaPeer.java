import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.MessageDigest;
import java.security.cert.CertificateFactory;
import java.util.HexFormat;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLParameters;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

/** A peer on the JDK's SSLSocket: java JavaPeer.java ROLE PORT VERSION PFX CA MUTUAL NAME PAYLOAD; see peers.py. */
public class JavaPeer {
    private static SSLContext context(Path pfx, Path authority) throws Exception {
        KeyStore own = KeyStore.getInstance("PKCS12");
        try (InputStream file = Files.newInputStream(pfx)) {
            own.load(file, "interop".toCharArray());
        }
        KeyManagerFactory keys = KeyManagerFactory.getInstance(KeyManagerFactory.getDefaultAlgorithm());
        keys.init(own, "interop".toCharArray());
        KeyStore trusted = KeyStore.getInstance("PKCS12");
        trusted.load(null, null);
        try (InputStream file = Files.newInputStream(authority)) {
            trusted.setCertificateEntry("ca", CertificateFactory.getInstance("X.509").generateCertificate(file));
        }
        TrustManagerFactory trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(trusted);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(keys.getKeyManagers(), trust.getTrustManagers(), null);
        return context;
    }

    private static SSLSocket connect(SSLContext context, int port, String version, String name) throws Exception {
        SSLSocket socket = (SSLSocket) context.getSocketFactory().createSocket(
            new java.net.Socket(InetAddress.getLoopbackAddress(), port), name, port, true);
        SSLParameters parameters = socket.getSSLParameters();
        parameters.setEndpointIdentificationAlgorithm("HTTPS");
        parameters.setProtocols(new String[] {version});
        socket.setSSLParameters(parameters);
        return socket;
    }

    private static SSLSocket accept(SSLContext context, String version, boolean mutual) throws Exception {
        try (SSLServerSocket listener = (SSLServerSocket) context.getServerSocketFactory().createServerSocket(
                0, 1, InetAddress.getLoopbackAddress())) {
            listener.setEnabledProtocols(new String[] {version});
            listener.setNeedClientAuth(mutual);
            System.out.println("READY " + listener.getLocalPort());
            System.out.flush();
            return (SSLSocket) listener.accept();
        }
    }

    public static void main(String[] arguments) throws Exception {
        boolean server = arguments[0].equals("server");
        boolean mutual = Boolean.parseBoolean(arguments[5]);
        SSLContext context = context(Path.of(arguments[3]), Path.of(arguments[4]));
        try (SSLSocket socket = server
                ? accept(context, arguments[2], mutual)
                : connect(context, Integer.parseInt(arguments[1]), arguments[2], arguments[6])) {
            socket.startHandshake();
            OutputStream out = socket.getOutputStream();
            out.write(Files.readAllBytes(Path.of(arguments[7])));
            out.flush();
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            byte[] buffer = new byte[65536];
            long received = 0;
            InputStream in = socket.getInputStream();
            for (int count; (count = in.read(buffer)) > 0; received += count) {
                digest.update(buffer, 0, count);
            }
            System.out.printf("{\"version\": \"%s\", \"cipher\": \"%s\", \"received\": %d, \"sha256\": \"%s\"}%n",
                socket.getSession().getProtocol(), socket.getSession().getCipherSuite(), received,
                HexFormat.of().formatHex(digest.digest()));
        }
    }
}
